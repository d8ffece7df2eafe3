// The producer warps of the backward: they walk over tiles, and bring to shared memory what the consumers
// (backward_consumer.cuh) compute with.
#pragma once

#include "backward_tiles.cuh"

namespace jax_natten::sm90 {

// Walks over row tiles, and for each over its column tiles. One warp, whose first lane decodes.
template <class Traits>
struct PassWalk {
  static constexpr int kRank = Traits::kRank;
  using Cursor = typename Traits::Cursor;

  const BackwardParams& params;
  QueryTile& tile;  // the row tile. In shared memory: producers have few registers.
  const int lane;

  // Calls begin_tile() before the column tiles of a row tile, begin_head(head) before those of one head, and
  // visit(cursor, head, last) for each.
  template <class BeginTile, class BeginHead, class Visit>
  __device__ __forceinline__ void run(BeginTile begin_tile, BeginHead begin_head, Visit visit) {
    // Columns are of the key and value head of the row tile's queries, or of the query heads of its keys.
    const int group = params.schedule.by_group.divisor, heads = Traits::kPass == kQueryPass ? 1 : group;
    for (int index = blockIdx.x; index < params.schedule.tiles; index += gridDim.x) {
      __syncwarp();
      if (lane == 0) tile = decode_query_tile<kRank, Traits::kPass>(params.schedule, index);
      __syncwarp();
      if (tile.empty()) continue;
      begin_tile();
      const int first = Traits::kPass == kQueryPass ? params.schedule.by_group.quotient(tile.head) : tile.head * group;
#pragma unroll 1
      for (int head = first; head < first + heads; ++head) {
        begin_head(head);
        Cursor cursor;
        for (bool more = true; more;) {
          const Cursor current = cursor;
          more = cursor.next(params.schedule.axes, tile.extent, params.extension);
          visit(current, head, head + 1 == first + heads && !more);
        }
      }
    }
  }

  // No lane may fall behind by a phase.
  __device__ __forceinline__ void wait(uint64_t* empty, uint32_t parity) const {
    ptx::barrier_wait(empty, parity);
    __syncwarp();
  }
};

// One warp has the TMA load tiles. A stage that becomes free is on the way of the whole CTA: what can be found out
// before is. Lane 3 p + a knows what part p sees along axis a.
template <class Traits>
struct PassProducer {
  using Shared = typename Traits::Shared;
  using Cursor = typename Traits::Cursor;
  static constexpr int kRank = Traits::kRank, kParts = Traits::kParts;
  // With one slot the rows must wait until the previous tile is done. The first column tiles go ahead of them.
  static constexpr int kAhead = Traits::kSlots == 1 ? Traits::kStages : 0;

  const BackwardParams& params;
  Shared& smem;
  const int lane, axis;
  PassWalk<Traits> walk{params, smem.produced_tile, lane};
  RingPosition<Traits::kSlots> slot{1};  // parity 1 passes on fresh barriers
  RingPosition<Traits::kStages> stage{1};

  Span span;      // relative to QueryTile::key; nothing if the part has no rows inside the grid
  uint32_t live;  // of which lanes it is something

  __device__ PassProducer(const BackwardParams& params, Shared& smem, int lane)
      : params(params), smem(smem), lane(lane), axis(lane % kMaxRank) {}

  __device__ void run() {
    int ahead;  // column tiles that go before the rows
    int slab;   // of the column boxes
    const auto begin_tile = [&] {
      find_span();
      ahead = kAhead;
      if (kAhead == 0) load_rows();
    };
    const auto begin_head = [&](int head) { slab = params.column_address.slab<kRank>(smem.produced_tile, head); };
    walk.run(begin_tile, begin_head, [&](const Cursor& cursor, int head, bool last) {
      load_columns(cursor, head, slab, last);
      if (kAhead > 0 && (--ahead == 0 || (last && ahead > 0))) load_rows();
    });
#pragma unroll 1
    for (int set = 0; set < Traits::kRowSets; ++set) {
      ptx::barrier_wait(&smem.row_empty[slot.index][set], slot.parity);
      if (lane == 0) {
        smem.row_records[slot.index][set].has_tile = 0;
        ptx::barrier_arrive(&smem.row_full[slot.index][set]);
      }
    }
  }

 private:
  __device__ __forceinline__ void find_span() {
    const QueryTile& tile = smem.produced_tile;
    const TiledAxis& along = params.schedule.axes[axis];
    const int part = lane < kParts * kMaxRank ? lane / kMaxRank : 0, length = tile.length[axis];
    const int first = tile.query[axis] + smem.part_offset[part][axis];
    const int last = imin(first + along.query_part, length) - 1;
    span = span_of_queries<Traits::kPass>(along, imin(first, length - 1), last, length);
    span.any.begin -= tile.key[axis];
    span.any.end = first <= last ? span.any.end - tile.key[axis] : 0;
    span.all.begin -= tile.key[axis];
    span.all.end -= tile.key[axis];
    live = __ballot_sync(~0u, first <= last);
  }

  // Two bits per part: what it does with the column tile.
  __device__ __forceinline__ uint32_t classify(const Cursor& cursor) const {
    const int begin = axis == 0 ? cursor.begin[0] : axis == 1 ? cursor.begin[1] : cursor.begin[2];
    const int end = begin + params.schedule.axes[axis].key_tile;
    uint32_t seen = live & __ballot_sync(~0u, begin < span.any.end && end > span.any.begin);
    uint32_t whole = __ballot_sync(~0u, begin >= span.all.begin && end <= span.all.end);
    bool padded = params.padded;
    if (!cursor.in_window()) {
      seen = live;
      whole = ~0u;
      padded = padded || cursor.additional + params.extension.box > params.extension.additional;
    }
    uint32_t classes = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t axes = 7u << kMaxRank * part;
      const TileClass what = (seen & axes) != axes              ? TileClass::kSkip
                             : (whole & axes) != axes || padded ? TileClass::kMasked
                                                                : TileClass::kWhole;
      classes |= uint32_t(what) << 2 * part;
    }
    return classes;
  }

  __device__ __forceinline__ void load_rows() {
    const QueryTile& tile = smem.produced_tile;
#pragma unroll 1
    for (int set = 0; set < Traits::kRowSets; ++set) {
      walk.wait(&smem.row_empty[slot.index][set], slot.parity);
      if (lane != 0) continue;
      const int slab = params.row_address.slab<kRank>(tile, tile.head), map = map_variant<kRank>(params, tile);
      uint64_t* full = &smem.row_full[slot.index][set];
      smem.row_records[slot.index][set] = {tile, slab, map, 1};
      ptx::barrier_arrive_expecting(full, Traits::kPartsOfSet * params.row_bytes);
#pragma unroll 1
      for (int part = set * Traits::kPartsOfSet; part < (set + 1) * Traits::kPartsOfSet; ++part) {
        const int (&offset)[kMaxRank] = smem.part_offset[part];
#pragma unroll 1
        for (int operand = 0; operand < kOperands; ++operand) {
          const int channel = operand == kScores ? params.first_channel : 0;
#pragma unroll
          for (int c = 0; c < Traits::kChunks; ++c) {
            ptx::tma_load(ptx::shared_address(smem.row[slot.index][part][operand][c]), &params.maps[map].row[operand],
                          full, channel + c * Traits::kChunk, tile.query[2] + offset[2], tile.query[1] + offset[1],
                          tile.query[0] + offset[0], slab, ptx::CachePolicy::kEvictFirst);
          }
        }
      }
    }
    slot.advance();
  }

  __device__ __forceinline__ void load_columns(const Cursor& cursor, int head, int slab, bool last) {
    const QueryTile& tile = smem.produced_tile;
    const uint32_t classes = classify(cursor) | (last ? ColumnRecord::kLast : 0);
    ColumnExtension extension;
    if constexpr (Traits::kExtended) extension = find_extension(cursor, head);
    const int map = map_variant<kRank>(params, tile);

    walk.wait(&smem.column_empty[stage.index], stage.parity);
    if (lane == 0) {
      smem.column_records[stage.index] = {{cursor.begin[0], cursor.begin[1], cursor.begin[2]}, classes};
      if constexpr (Traits::kExtended) smem.column_extensions[stage.index] = extension;
      int x[kMaxRank] = {tile.key[0] + cursor.begin[0], tile.key[1] + cursor.begin[1], tile.key[2] + cursor.begin[2]};
      if (!cursor.in_window()) {
        x[0] = x[1] = 0;
        x[2] = cursor.additional;
        slab = tile.batch * params.extension.per_batch + head;
      }
#pragma unroll 1
      for (int operand = 0; operand < kOperands; ++operand) {
        const CUtensorMap* columns = &params.maps[map].column[operand];
        if (!cursor.in_window()) columns = operand == kScores ? &params.extension.key : &params.extension.value;
        uint64_t* full = &smem.column_full[stage.index][operand];
        ptx::barrier_arrive_expecting(full, params.column_bytes);
#pragma unroll
        for (int c = 0; c < Traits::kChunks; ++c) {
          ptx::tma_load(ptx::shared_address(smem.column[stage.index][operand][c]), columns, full, c * Traits::kChunk,
                        x[2], x[1], x[0], slab, ptx::CachePolicy::kEvictLast);
        }
      }
    }
    stage.advance();
  }

  __device__ __forceinline__ ColumnExtension find_extension(const Cursor& cursor, int head) const {
    const QueryTile& tile = smem.produced_tile;
    const KeyExtension& extension = params.extension;
    const float* entries = nullptr;
    if (cursor.in_window() && extension.bias != nullptr) {
      entries = extension.entries(tile.batch, Traits::kPass == kQueryPass ? tile.head : head);
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        entries += (tile.key[a] + cursor.begin[a] - tile.query[a]) * extension.bias_step[a];
      }
    }
    const int left = imin(extension.additional - cursor.additional, extension.box);
    return {entries, cursor.in_window() ? -1 : left};
  }
};

// In the key pass, another warp gathers the start values of the columns (backward_key.cuh).
template <class Traits>
struct StartProducer {
  using Shared = typename Traits::Shared;
  using Cursor = typename Traits::Cursor;
  static constexpr int kRank = Traits::kRank;

  const BackwardParams& params;
  Shared& smem;
  const int lane;
  PassWalk<Traits> walk{params, smem.gathered_tile, lane};
  RingPosition<Traits::kStages> stage{1};  // parity 1 passes on fresh barriers

  __device__ StartProducer(const BackwardParams& params, Shared& smem, int lane)
      : params(params), smem(smem), lane(lane) {}

  __device__ void run() {
    int first;  // place of the start value at in-group position (0, 0, 0)
    const auto begin_head = [&](int head) {
      first = params.start_address.slab<kRank>(smem.gathered_tile, head * params.positions);
    };
    walk.run([] {}, begin_head, [&](const Cursor& cursor, int, bool) { gather(cursor.begin, first); });
  }

 private:
  // Columns outside the grid start at zero; they are masked.
  __device__ __forceinline__ void gather(const int (&begin)[kMaxRank], int first) {
    const QueryTile& tile = smem.gathered_tile;
    int left[kMaxRank];  // columns inside the grid
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int x = tile.key[a] + begin[a];
      left[a] = (Traits::kExtended ? imin(tile.length[a], params.most_columns) : tile.length[a]) - x;
      first += x * params.position_step[a];
    }
    walk.wait(&smem.column_empty[stage.index], stage.parity);
#pragma unroll 1
    for (int column = lane; column < Traits::kColumns; column += 32) {
      const auto [x, positions] = smem.places[column];
      const bool inside =
          x != ColumnPlace::kNone && int(x & 255) < left[0] && int(x >> 8 & 255) < left[1] && int(x >> 16) < left[2];
      const int at = inside ? first + positions : 0;
      for (int operand = 0; operand < kOperands; ++operand) {
        ptx::copy_async<4>(ptx::shared_address(&smem.start[stage.index][operand][column]), params.start[operand] + at,
                           inside);
      }
    }
    ptx::copy_async_arrive(&smem.column_full[stage.index][kScores]);
    stage.advance();
  }
};

// In the key pass, two warps find the masks of column tiles ahead of their use: one thread for each row of the parts.
template <class Traits>
struct MaskProducer {
  using Shared = typename Traits::Shared;
  static constexpr int kRank = Traits::kRank;
  static_assert(!Traits::kMasksAhead || Traits::kRowSets == 1, "one set tells what all parts see");

  const BackwardParams& params;
  Shared& smem;
  const int row;
  RingPosition<Traits::kSlots> slot{0};
  RingPosition<Traits::kStages> stage{0};

  __device__ MaskProducer(const BackwardParams& params, Shared& smem, int row) : params(params), smem(smem), row(row) {}

  __device__ void run() {
    for (;;) {
      ptx::barrier_wait(&smem.row_full[slot.index][0], slot.parity);
      const RowRecord& rows = smem.row_records[slot.index][0];
      if (!rows.has_tile) return;
      find_windows(rows.tile);
      for (bool last = false; !last;) {
        ptx::barrier_wait(&smem.column_full[stage.index][kScores], stage.parity);
        const ColumnRecord& record = smem.column_records[stage.index];
        const uint32_t classes = record.classes;
#pragma unroll 1
        for (int part = 0; part < Traits::kParts; ++part) {
          if (TileClass(classes >> 2 * part & 3) == TileClass::kMasked) {
            smem.masks[stage.index][part][row] = find_mask(part, record.begin);
          }
        }
        __syncwarp();
        if (row % 32 == 0) ptx::barrier_arrive(&smem.column_full[stage.index][kGradients]);
        last = classes & ColumnRecord::kLast;
        stage.advance();
      }
      slot.advance();
    }
  }

 private:
  // Of rows that do not exist, those of the part's last, as in describe_rows().
  __device__ __forceinline__ void find_windows(const QueryTile& tile) {
#pragma unroll 1
    for (int part = 0; part < Traits::kParts; ++part) {
#pragma unroll 1
      for (int a = 0; a < kRank; ++a) {
        const int axis = kMaxRank - kRank + a, length = tile.length[axis];
        const TiledAxis& along = params.schedule.axes[axis];
        const int first = tile.query[axis] + smem.part_offset[part][axis];
        const int x =
            imin(first + int(smem.row_coordinates[row] >> 8 * axis & 255), imin(first + along.query_part, length) - 1);
        const Interval w = partners<Traits::kPass>(along, x, length);
        smem.windows[part][row][a] = {w.begin - tile.key[axis], w.end - tile.key[axis]};
      }
    }
  }

  // The words of all quad lanes.
  __device__ __forceinline__ uint4 find_mask(int part, const int (&begin)[kMaxRank]) const {
    uint4 mask = make_uint4(~0u, ~0u, ~0u, ~0u);
#pragma unroll 1
    for (int a = 0; a < kRank; ++a) {
      const int axis = kMaxRank - kRank + a;
      const Interval w = smem.windows[part][row][a];
      const uint4 from = table_row(axis, w.begin - begin[axis]), to = table_row(axis, w.end - begin[axis]);
      mask.x &= from.x & ~to.x;
      mask.y &= from.y & ~to.y;
      mask.z &= from.z & ~to.z;
      mask.w &= from.w & ~to.w;
    }
    return mask;
  }

  __device__ __forceinline__ uint4 table_row(int axis, int coordinate) const {
    const int c = imin(imax(coordinate, 0), params.mask_layout.tile[axis]);
    return reinterpret_cast<const uint4*>(smem.mask_table)[params.mask_layout.first[axis] + c];
  }
};

}  // namespace jax_natten::sm90
