#include "problem.h"

#include <array>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "../common/workspace.h"

namespace jax_natten {
namespace {

namespace ffi = xla::ffi;

// The dimensions of the operands by name. The first buffer that has a dimension binds its size, later ones must agree.
enum Dim { kBatch, kHeads, kKvHeads, kHeadDim, kValueDim, kAdditional, kSlots, kBiasBatch, kBiasHeads, kNamedDims };
// These stand for as many dimensions as the grid has axes: the grid itself, and 2 * kernel_size - 1.
constexpr Dim kGrid = Dim(kNamedDims), kBiasTable = Dim(kNamedDims + 1);

constexpr const char* kDimNames[] = {
    "batch", "heads",      "kv_heads",   "head_dim", "value_dim",          "additional",
    "slots", "bias_batch", "bias_heads", "grid",     "2 * kernel_size - 1"};

// Element type of a buffer: that of the inputs, or the accumulation type that goes with it.
enum class Element { kInput, kAccumulation };

// Kernels keep positions in 32-bit integers and add up to two of them.
constexpr int64_t kMaxAxisLength = (int64_t(1) << 30) - 1;
constexpr int64_t kMaxSize = (int64_t(1) << 31) - 1;

std::string join(const int64_t* begin, size_t count) {
  std::ostringstream text;
  text << '[';
  for (size_t n = 0; n < count; ++n) text << (n ? ", " : "") << begin[n];
  text << ']';
  return text.str();
}

template <typename T>
std::string str(const T& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

// Takes the call apart in wire order. After the first mistake it only hands out nulls; `finish` reports the mistake.
class Decoder {
 public:
  Decoder(const char* target, const CallFrame& frame) : target_(target), frame_(frame) { sizes_.fill(-1); }

  void window(Neighborhood& neighborhood) {
    const auto window = integers_attribute("kernel_size");
    const auto stride = integers_attribute("stride");
    const auto dilation = integers_attribute("dilation");
    const auto causal = integers_attribute("is_causal");
    if (failed()) return;
    rank_ = window.size();
    if (rank_ < 1 || rank_ > kMaxRank)
      return fail("attribute kernel_size has " + str(rank_) + " entries, expected 1 to 3");
    for (const auto* other : {&stride, &dilation, &causal}) {
      if (other->size() != rank_) {
        return fail("attributes stride, dilation and is_causal must have as many entries as kernel_size: got " +
                    str(other->size()) + ", expected " + str(rank_));
      }
    }
    neighborhood = Neighborhood();
    neighborhood.rank = int(rank_);
    for (size_t n = 0; n < rank_; ++n) {
      const std::string where = " on grid axis " + str(n);
      if (window[n] < 1 || window[n] > kMaxAxisLength) {
        return fail("attribute kernel_size is " + str(window[n]) + where + ", expected 1 to " + str(kMaxAxisLength));
      }
      if (stride[n] < 1 || stride[n] > window[n]) {
        return fail("attribute stride is " + str(stride[n]) + where +
                    ", expected 1 to kernel_size = " + str(window[n]));
      }
      if (dilation[n] < 1 || dilation[n] > kMaxAxisLength) {
        return fail("attribute dilation is " + str(dilation[n]) + where + ", expected 1 to " + str(kMaxAxisLength));
      }
      if (causal[n] != 0 && causal[n] != 1) {
        return fail("attribute is_causal is " + str(causal[n]) + where + ", expected 0 or 1");
      }
      Axis& axis = neighborhood.axes[kMaxRank - rank_ + n];
      axis.window = int(window[n]);
      axis.stride = int(stride[n]);
      axis.dilation = int(dilation[n]);
      axis.causal = causal[n] != 0;
    }
    neighborhood_ = &neighborhood;
  }

  template <typename T>
  T attribute(const char* name) {
    ++attributes_read_;
    if (failed()) return T();
    auto value = frame_.attributes.get<T>(name);
    if (value.has_value()) return *value;
    fail(std::string("attribute ") + name + " is missing or of the wrong type: " + value.error().message());
    return T();
  }

  Precision precision() {
    const auto name = attribute<std::string_view>("precision");
    if (name == "default") return Precision::kDefault;
    if (name == "high") return Precision::kHigh;
    if (name != "highest") {
      fail("attribute precision is \"" + std::string(name) + "\", expected \"default\", \"high\" or \"highest\"");
    }
    return Precision::kHighest;
  }

  // An attribute that few programs have.
  AskedTiles tiles(const char* name) {
    if (failed() || !frame_.attributes.contains(name)) return {};
    const auto fields = integers_attribute(name);
    return {fields.begin(), fields.size()};
  }

  const void* operand(const char* name, Element element, std::initializer_list<Dim> dims) {
    if (failed()) return nullptr;
    auto buffer = frame_.operands.get<ffi::AnyBuffer>(operands_read_++);
    if (!buffer.has_value()) return missing("operand", name, frame_.operands.size());
    return checked(name, *buffer, element, dims);
  }

  void* result(const char* name, Element element, std::initializer_list<Dim> dims) {
    if (failed()) return nullptr;
    auto buffer = frame_.results.get<ffi::AnyBuffer>(results_read_++);
    if (!buffer.has_value()) return missing("result", name, frame_.results.size());
    return checked(name, **buffer, element, dims);
  }

  // The bias and its gradient: [bias_batch, heads, 2 K - 1 ..], or zero heads for "no bias".
  const void* bias_operand(const char* name) {
    const void* data = operand(name, Element::kAccumulation, {kBiasBatch, kBiasHeads, kBiasTable});
    if (failed()) return nullptr;
    const int64_t batch = sizes_[kBatch], groups = sizes_[kBiasBatch], heads = sizes_[kBiasHeads];
    if (heads != 0 && heads != sizes_[kHeads]) {
      fail(std::string(name) + " has " + str(heads) + " heads (axis 1), expected heads = " + str(sizes_[kHeads]) +
           ", or 0 for no bias");
    } else if (heads != 0 && (groups == 0 ? batch != 0 : batch % groups != 0)) {
      fail(std::string(name) + " has batch size " + str(groups) +
           " (axis 0), expected a divisor of batch = " + str(batch));
    }
    return data;
  }

  void* workspace(int64_t* size) {
    if (failed()) return nullptr;
    auto buffer = frame_.results.get<ffi::AnyBuffer>(results_read_++);
    if (!buffer.has_value()) return missing("result", "workspace", frame_.results.size());
    const ffi::AnyBuffer workspace = **buffer;
    if (workspace.dimensions().size() != 1) {
      fail("workspace has rank " + str(workspace.dimensions().size()) + ", expected 1");
      return nullptr;
    }
    *size = workspace.dimensions()[0];
    check_element("workspace", workspace.element_type(), Element::kAccumulation);
    return workspace.untyped_data();
  }

  // Slots of the unfused weights: known once the window and the number of additional keys are.
  void bind_slots() {
    if (!failed()) sizes_[kSlots] = neighborhood_->window_size() + sizes_[kAdditional];
  }

  void check_slots(const char* name) {
    if (failed()) return;
    const int64_t slots = sizes_[kSlots];
    if (slots != neighborhood_->window_size() + sizes_[kAdditional]) {
      fail(std::string(name) + " has " + str(slots) + " slots (last axis), expected prod(kernel_size) + additional = " +
           str(neighborhood_->window_size()) + " + " + str(sizes_[kAdditional]));
    }
  }

  // Copies the sizes that both shape structs have.
  template <typename Shape>
  void shape(Shape& shape) {
    if (failed()) return;
    for (Dim dim : {kHeads, kKvHeads, kHeadDim, kValueDim, kAdditional}) {
      const int64_t least = dim == kAdditional ? 0 : 1;
      const int64_t size = sizes_[dim];
      if (size != -1 && (size < least || size > kMaxSize)) {
        return fail(std::string(kDimNames[dim]) + " is " + str(size) + ", expected " + str(least) + " to " +
                    str(kMaxSize));
      }
    }
    // Only grids of empty tensors can get here with products that do not fit.
    double positions = 1, window = 1;
    for (const Axis& axis : neighborhood_->axes) {
      positions *= axis.length;
      window *= 2.0 * axis.window;
    }
    if (positions > 0x1p48 || window > 0x1p48) return fail("the grid or kernel_size is too large");
    if (sizes_[kHeads] % sizes_[kKvHeads] != 0) {
      return fail("heads = " + str(sizes_[kHeads]) + " is not a multiple of kv_heads = " + str(sizes_[kKvHeads]));
    }
    shape.dtype = dtype_;
    shape.batch = sizes_[kBatch];
    shape.heads = int(sizes_[kHeads]);
    shape.kv_heads = int(sizes_[kKvHeads]);
    shape.dim = int(sizes_[kHeadDim]);
    shape.additional = int(sizes_[kAdditional]);
    shape.bias_batch = sizes_[kBiasHeads] > 0 ? sizes_[kBiasBatch] : 0;
  }

  int64_t size(Dim dim) const { return sizes_[dim]; }
  bool failed() const { return !message_.empty(); }

  void fail(const std::string& message) {
    if (message_.empty()) message_ = std::string(target_) + ": " + message;
  }

  ffi::Error finish() {
    if (operands_read_ != frame_.operands.size()) {
      fail("got " + str(frame_.operands.size()) + " operands, expected " + str(operands_read_));
    }
    if (results_read_ != frame_.results.size()) {
      fail("got " + str(frame_.results.size()) + " results, expected " + str(results_read_));
    }
    if (attributes_read_ != frame_.attributes.size()) {
      fail("got " + str(frame_.attributes.size()) + " attributes, expected " + str(attributes_read_));
    }
    return failed() ? ffi::Error::InvalidArgument(message_) : ffi::Error::Success();
  }

 private:
  ffi::Span<const int64_t> integers_attribute(const char* name) {
    ++attributes_read_;
    if (failed()) return {};
    auto value = frame_.attributes.get<ffi::Span<const int64_t>>(name);
    if (value.has_value()) return *value;
    fail(std::string("attribute ") + name + " is missing or no array of int64: " + value.error().message());
    return {};
  }

  std::nullptr_t missing(const char* what, const char* name, size_t got) {
    fail(std::string(what) + " " + name + " is missing: got only " + str(got) + " " + what + "s");
    return nullptr;
  }

  void* checked(const char* name, const ffi::AnyBuffer& buffer, Element element, std::initializer_list<Dim> dims) {
    check_element(name, buffer.element_type(), element);
    check_dims(name, buffer.dimensions(), dims);
    return failed() ? nullptr : buffer.untyped_data();
  }

  void check_element(const char* name, ffi::DataType got, Element element) {
    if (failed()) return;
    if (element == Element::kInput && !has_dtype_) {
      has_dtype_ = true;
      input_ = got;
      switch (got) {
        case ffi::DataType::F16:
          dtype_ = DType::kFloat16;
          break;
        case ffi::DataType::BF16:
          dtype_ = DType::kBFloat16;
          break;
        case ffi::DataType::F32:
          dtype_ = DType::kFloat32;
          break;
        case ffi::DataType::F64:
          dtype_ = DType::kFloat64;
          break;
        default:
          fail(std::string(name) + " has dtype " + str(got) + ", expected F16, BF16, F32 or F64");
      }
      return;
    }
    const ffi::DataType accumulation = input_ == ffi::DataType::F64 ? ffi::DataType::F64 : ffi::DataType::F32;
    const ffi::DataType expected = element == Element::kInput ? input_ : accumulation;
    if (got != expected) fail(std::string(name) + " has dtype " + str(got) + ", expected " + str(expected));
  }

  void check_dims(const char* name, ffi::Span<const int64_t> got, std::initializer_list<Dim> dims) {
    if (failed()) return;
    std::string layout;
    size_t rank = 0;
    for (Dim dim : dims) {
      layout += (layout.empty() ? "" : ", ") + std::string(dim >= kNamedDims ? "*" : "") + kDimNames[dim];
      rank += dim >= kNamedDims ? rank_ : 1;
    }
    const std::string who = std::string(name) + " has shape " + join(got.begin(), got.size());
    if (got.size() != rank) {
      return fail(who + ", expected rank " + str(rank) + ": [" + layout + "] with " + str(rank_) + " grid axes");
    }
    size_t axis = 0;
    const auto expect = [&](int64_t expected, Dim dim) {
      if (got[axis] != expected) {
        fail(who + ", expected " + kDimNames[dim] + " = " + str(expected) + " on axis " + str(axis) + " of [" + layout +
             "]");
      }
    };
    for (Dim dim : dims) {
      if (dim == kGrid) {
        for (size_t n = 0; n < rank_; ++n, ++axis) {
          if (has_grid_) {
            expect(grid(n).length, dim);
          } else {
            bind_grid_axis(who, n, got[axis]);
          }
        }
        has_grid_ = true;
      } else if (dim == kBiasTable) {
        for (size_t n = 0; n < rank_; ++n, ++axis) {
          if (sizes_[kBiasHeads] != 0) expect(2 * int64_t(grid(n).window) - 1, dim);
        }
      } else {
        if (sizes_[dim] == -1) sizes_[dim] = got[axis];
        expect(sizes_[dim], dim);
        ++axis;
      }
    }
  }

  void bind_grid_axis(const std::string& who, size_t n, int64_t length) {
    Axis& axis = grid(n);
    if (length > kMaxAxisLength) {
      return fail(who + ", expected at most " + str(kMaxAxisLength) + " positions on grid axis " + str(n));
    }
    if (length > 0 && int64_t(axis.window) * axis.dilation > length) {
      return fail(who + ": kernel_size * dilation = " + str(axis.window) + " * " + str(axis.dilation) +
                  " exceeds the length " + str(length) + " of grid axis " + str(n));
    }
    axis.length = int(length);
  }

  Axis& grid(size_t n) { return neighborhood_->axes[kMaxRank - rank_ + n]; }

  const char* target_;
  const CallFrame& frame_;
  std::string message_;
  size_t attributes_read_ = 0, operands_read_ = 0, results_read_ = 0;
  size_t rank_ = 0;
  Neighborhood* neighborhood_ = nullptr;
  bool has_grid_ = false, has_dtype_ = false;
  ffi::DataType input_ = ffi::DataType::F32;
  DType dtype_ = DType::kFloat32;
  std::array<int64_t, kNamedDims> sizes_;
};

// The six inputs that the fused forward and backward share.
template <typename Params>
void fused_inputs(Decoder& decoder, Params& params, std::string_view& implementation) {
  decoder.window(params.neighborhood);
  params.scale = decoder.attribute<double>("scale");
  params.precision = decoder.precision();
  implementation = decoder.attribute<std::string_view>("implementation");
  params.query = decoder.operand("query", Element::kInput, {kBatch, kGrid, kHeads, kHeadDim});
  params.key = decoder.operand("key", Element::kInput, {kBatch, kGrid, kKvHeads, kHeadDim});
  params.value = decoder.operand("value", Element::kInput, {kBatch, kGrid, kKvHeads, kValueDim});
  params.additional_keys =
      decoder.operand("additional_keys", Element::kInput, {kBatch, kAdditional, kKvHeads, kHeadDim});
  params.additional_values =
      decoder.operand("additional_values", Element::kInput, {kBatch, kAdditional, kKvHeads, kValueDim});
  params.bias = decoder.bias_operand("bias");
  decoder.shape(params);
  if (!decoder.failed()) params.value_dim = int(decoder.size(kValueDim));
}

void check_workspace(Decoder& decoder, int64_t got, int64_t expected) {
  if (!decoder.failed() && got < expected) {
    decoder.fail("workspace has " + str(got) + " elements, expected at least " + str(expected));
  }
}

}  // namespace

ffi::Error decode(const CallFrame& frame, FusedForwardParams& params, std::string_view& implementation) {
  Decoder decoder(kFusedForwardTarget, frame);
  fused_inputs(decoder, params, implementation);
  params.sm90_tiles = decoder.tiles("tiles");
  params.sm80_tiles = decoder.tiles("sm80_tiles");
  params.out = decoder.result("out", Element::kInput, {kBatch, kGrid, kHeads, kValueDim});
  params.lse = decoder.result("lse", Element::kAccumulation, {kBatch, kGrid, kHeads});
  return decoder.finish();
}

ffi::Error decode(const CallFrame& frame, FusedBackwardParams& params, std::string_view& implementation) {
  Decoder decoder(kFusedBackwardTarget, frame);
  fused_inputs(decoder, params, implementation);
  params.out = decoder.operand("out", Element::kInput, {kBatch, kGrid, kHeads, kValueDim});
  params.lse = decoder.operand("lse", Element::kAccumulation, {kBatch, kGrid, kHeads});
  params.d_out = decoder.operand("d_out", Element::kInput, {kBatch, kGrid, kHeads, kValueDim});
  params.d_lse = decoder.operand("d_lse", Element::kAccumulation, {kBatch, kGrid, kHeads});
  params.d_query = decoder.result("d_query", Element::kInput, {kBatch, kGrid, kHeads, kHeadDim});
  params.d_key = decoder.result("d_key", Element::kInput, {kBatch, kGrid, kKvHeads, kHeadDim});
  params.d_value = decoder.result("d_value", Element::kInput, {kBatch, kGrid, kKvHeads, kValueDim});
  params.d_additional_keys =
      decoder.result("d_additional_keys", Element::kInput, {kBatch, kAdditional, kKvHeads, kHeadDim});
  params.d_additional_values =
      decoder.result("d_additional_values", Element::kInput, {kBatch, kAdditional, kKvHeads, kValueDim});
  params.d_bias = decoder.result("d_bias", Element::kAccumulation, {kBiasBatch, kBiasHeads, kBiasTable});
  params.workspace = decoder.workspace(&params.workspace_size);
  if (!decoder.failed()) check_workspace(decoder, params.workspace_size, least_fused_backward_workspace(params));
  return decoder.finish();
}

ffi::Error decode(const CallFrame& frame, PnParams& params, std::string_view& implementation) {
  Decoder decoder(kPnTarget, frame);
  decoder.window(params.neighborhood);
  params.precision = decoder.precision();
  params.fill_negative_infinity = decoder.attribute<bool>("fill_negative_infinity");
  implementation = decoder.attribute<std::string_view>("implementation");
  params.queries = decoder.operand("queries", Element::kInput, {kBatch, kGrid, kHeads, kHeadDim});
  params.keys = decoder.operand("keys", Element::kInput, {kBatch, kGrid, kKvHeads, kHeadDim});
  params.additional_keys =
      decoder.operand("additional_keys", Element::kInput, {kBatch, kAdditional, kKvHeads, kHeadDim});
  params.bias = decoder.bias_operand("bias");
  decoder.bind_slots();
  decoder.shape(params);
  params.weights = decoder.result("weights", Element::kInput, {kBatch, kGrid, kHeads, kSlots});
  return decoder.finish();
}

ffi::Error decode(const CallFrame& frame, NnParams& params, std::string_view& implementation) {
  Decoder decoder(kNnTarget, frame);
  decoder.window(params.neighborhood);
  params.precision = decoder.precision();
  implementation = decoder.attribute<std::string_view>("implementation");
  params.weights = decoder.operand("weights", Element::kInput, {kBatch, kGrid, kHeads, kSlots});
  params.keys = decoder.operand("keys", Element::kInput, {kBatch, kGrid, kKvHeads, kHeadDim});
  params.additional_keys =
      decoder.operand("additional_keys", Element::kInput, {kBatch, kAdditional, kKvHeads, kHeadDim});
  decoder.check_slots("weights");
  decoder.shape(params);
  params.queries = decoder.result("queries", Element::kInput, {kBatch, kGrid, kHeads, kHeadDim});
  return decoder.finish();
}

ffi::Error decode(const CallFrame& frame, InParams& params, std::string_view& implementation) {
  Decoder decoder(kInTarget, frame);
  decoder.window(params.neighborhood);
  params.precision = decoder.precision();
  implementation = decoder.attribute<std::string_view>("implementation");
  params.weights = decoder.operand("weights", Element::kInput, {kBatch, kGrid, kHeads, kSlots});
  params.queries = decoder.operand("queries", Element::kInput, {kBatch, kGrid, kHeads, kHeadDim});
  params.keys = decoder.result("keys", Element::kInput, {kBatch, kGrid, kKvHeads, kHeadDim});
  params.additional_keys =
      decoder.result("additional_keys", Element::kInput, {kBatch, kAdditional, kKvHeads, kHeadDim});
  decoder.check_slots("weights");
  decoder.shape(params);
  params.workspace = decoder.workspace(&params.workspace_size);
  if (!decoder.failed()) check_workspace(decoder, params.workspace_size, in_workspace(params));
  return decoder.finish();
}

}  // namespace jax_natten
