// What the fused backward kernels are told.
#pragma once

#include "fused_params.h"

namespace jax_natten::sm80 {

// delta = rowsum(out * d_out) - d_lse of each query and head, as who computed it has laid it out.
struct DeltaArray {
  const float* data;
  int64_t batch_step, head_step, position_step;
  float factor;  // of what is read

  JAX_NATTEN_HD float at(int batch, int head, int position) const {
    return factor * data[batch * batch_step + head * head_step + position * position_step];
  }
};

struct BackwardParams : FusedParams {
  RowArray d_out;
  RowArray d_query;         // query pass
  RowArray d_key, d_value;  // key pass
  const float* d_lse;
  float* delta;         // [batch, positions, heads]: rowsum(out * d_out) - d_lse; the query pass writes it
  float problem_scale;  // of the scores, without the factor log2(e)
  int dim, value_dim, kv_heads;

  // The key pass over additional keys: partial sums over chunks of the queries, or null.
  float* partials;  // [batch, chunks, additional, kv_heads, dim + value_dim]
  int chunks;
  int additional_tiles;  // of a batch element, chunk and key head

  // The bias pass: partial tables. The tiles of queries of all batch elements that share a table are dealt out to the
  // chunks in turn.
  float* bias_partials;  // [chunks, bias_batch, heads, bias_size]
  int tiles_of_head, bias_batch;
  DeltaArray bias_delta;
};

}  // namespace jax_natten::sm80
