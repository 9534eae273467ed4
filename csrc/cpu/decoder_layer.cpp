// A Llama-like decoder layer for one new token a row, with the adapters of its streams:
//
//   n = rmsnorm(h);  q, k, v = n W^T (+ bias) (+ LoRA);  q, k rotated;  k, v into the cache
//   h = h + o(attention(q, keys, values));               o, gate, up, down as q
//   h = h + down(silu(gate(m)) * up(m)),                 m = rmsnorm(h)
//
// The pieces are those of rms_norm.cpp, rows_linear.cpp, lora_add.cpp, rotary.cpp and silu_mul.cpp,
// called one behind the other on the modules' own weights: what these give, and where they round, is
// the same bit for bit. Attention is float32 throughout and rounded once; the softmax's sum, and
// those over keys and values, have an order of their own.
//
// Why it is one operation: a layer of a decode step is some thirty operations of microseconds each,
// and what leads to an operation (Python, the dispatcher, a new tensor) takes as long as most of
// them. Products of the same rows are shared out among the threads as one (q, k, v; gate, up), and
// LoRA's delta is added to each piece of a product by the thread that has just made it.
//
// Bytes: the layer's weights once, its keys and values once. What lies between them stays in L2.

#include "cpu/decoder_layer.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/drivers.h"
#include "cpu/layer_rows.h"
#include "cpu/rms_norm.h"
#include "cpu/rotary.h"
#include "cpu/silu_mul.h"

#define QADAPTER_KERNEL "cpu/decoder_layer_kernel.h"
#include "cpu/isa_each.h"

namespace qadapter {
namespace {

enum Product { kQ, kK, kV, kO, kGate, kUp, kDown, kProducts };

struct Lora {
  int product;
  LoraJob job;  // without rows
  LoraTable run;
  int64_t first, end;    // its rows
  float* low = nullptr;  // x A^T of these
};

// What a call works on.
struct Layer {
  DType dtype;
  int64_t isa, rows, element;
  const Tensor *weights, *biases;  // of all products; a bias without elements is none
  std::vector<Lora> loras;

  int64_t out_of(int product) const { return weights[product].size(0); }
  int64_t into(int product) const { return weights[product].size(1); }
};

RowView dense_rows(char* data, int64_t rows, int64_t row_bytes) {
  RowView view;
  view.data = data;
  view.count = rows;
  view.far = row_bytes;
  return view;
}

// out[i] = products first .. first + count - 1 of x, with their biases and adapters.
void multiply(Layer& layer, int first, int count, char* x, char* const* out) {
  RowsJob jobs[kMostProducts];
  std::vector<Lora*> own[kMostProducts];
  const int64_t k = layer.into(first);
  for (int j = 0; j < count; ++j) {
    const Tensor &weight = layer.weights[first + j], &bias = layer.biases[first + j];
    RowsJob& job = jobs[j];
    job.x = dense_rows(x, layer.rows, k * layer.element);
    job.out = dense_rows(out[j], layer.rows, weight.size(0) * layer.element);
    job.w = static_cast<const char*>(weight.const_data_ptr());
    job.bias = bias.numel() > 0 ? bias.const_data_ptr() : nullptr;
    job.w_stride = weight.stride(0);
    job.k = k;
    job.o = weight.size(0);
  }
  std::vector<Lora*> all;
  int64_t floats = 0, most = 0;
  for (Lora& lora : layer.loras) {
    if (lora.product < first || lora.product >= first + count) continue;
    lora.job.x = jobs[lora.product - first].x;
    lora.job.out = jobs[lora.product - first].out;
    all.push_back(&lora);
    own[lora.product - first].push_back(&lora);
    floats += (lora.end - lora.first) * lora_stride(lora.job.r);
    most = std::max(most, (lora.end - lora.first) * lora.job.r * k);
  }
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<size_t>(floats)) memory.resize(floats);
  float* next = memory.data();
  for (Lora* lora : all) {
    lora->low = next;
    next += (lora->end - lora->first) * lora_stride(lora->job.r);
  }
  for_each_piece(static_cast<int64_t>(all.size()), most, [&](int64_t i) {
    const Lora& lora = *all[i];
    for (int64_t row = lora.first; row < lora.end; row += kLoraRows) {
      lora.run.low(lora.job, row, std::min(lora.end, row + kLoraRows),
                   lora.low + (row - lora.first) * lora_stride(lora.job.r));
    }
  });
  multiply_rows(jobs, count, layer.dtype, layer.isa, [&](int j, int64_t from, int64_t to) {
    for (const Lora* lora : own[j]) {
      for (int64_t row = lora->first; row < lora->end; row += kLoraRows) {
        lora->run.delta(lora->job, row, std::min(lora->end, row + kLoraRows),
                        lora->low + (row - lora->first) * lora_stride(lora->job.r), from, to);
      }
    }
  });
}

void norm_rows(const Layer& layer, char* x, const Tensor& weight, double eps, char* out) {
  NormJob job;
  job.columns = weight.size(0);
  job.x = dense_rows(x, layer.rows, job.columns * layer.element);
  job.out = out;
  job.weight = weight.const_data_ptr();
  job.eps = static_cast<float>(eps);
  norm_for(layer.isa, layer.dtype).fwd(job, 0, layer.rows);
}

// Heads [rows, heads, dim] of one token.
void rotate(const Layer& layer, RotaryJob job, const char* x, char* out, int64_t heads) {
  job.x = x;
  job.out = out;
  job.heads = heads;
  job.tokens = 1;
  job.x_strides[2] = 0;
  job.x_strides[1] = 2 * job.half * layer.element;
  job.x_strides[0] = heads * job.x_strides[1];
  std::copy(job.x_strides, job.x_strides + 3, job.out_strides);
  rotary_for(layer.isa, layer.dtype).fwd(job, 0, layer.rows * heads);
}

// Heads [rows, heads, dim] to the last token of a cache [rows, heads, tokens, dim].
void put_last(const Layer& layer, const char* x, Tensor& cache) {
  const int64_t heads = cache.size(1), bytes = cache.size(3) * layer.element;
  char* last = static_cast<char*>(cache.mutable_data_ptr()) +
               (cache.size(2) - 1) * cache.stride(2) * layer.element;
  for (int64_t i = 0; i < layer.rows * heads; ++i) {
    const int64_t at = i / heads * cache.stride(0) + i % heads * cache.stride(1);
    std::memcpy(last + at * layer.element, x + i * bytes, bytes);
  }
}

void check_cache(const Tensor& t, const char* name, const Tensor& hidden, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == hidden.scalar_type() && t.dim() == 4 &&
                      t.size(0) == hidden.size(0) && t.size(2) > 0 && t.size(3) == dim &&
                      (dim <= 1 || t.stride(3) == 1),
                  "decoder_layer: ", name, ": expected ", name_of(hidden.scalar_type()),
                  " [rows, heads, tokens, ", dim, "] with dense rows, as many rows as hidden ",
                  shape_of(hidden), ", got ", name_of(t.scalar_type()), " ", shape_of(t));
}

// [rows or 1, 1, dim]: what the heads of a row are turned by.
const char* angles(const Tensor& t, const char* name, const Tensor& hidden, int64_t element,
                   int64_t strides[2]) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == hidden.scalar_type() && t.dim() == 3 &&
                      (t.size(0) == 1 || t.size(0) == hidden.size(0)) && t.size(1) == 1 &&
                      t.size(2) % 2 == 0 && t.stride(2) == 1,
                  "decoder_layer: ", name, ": expected ", name_of(hidden.scalar_type()),
                  " [1 or rows, 1, D], D even, with dense rows, got ", name_of(t.scalar_type()),
                  " ", shape_of(t));
  strides[0] = t.size(0) == 1 ? 0 : t.stride(0) * element;
  strides[1] = 0;
  return static_cast<const char*>(t.const_data_ptr());
}

void check_weights(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                   const std::vector<Tensor>& norms, const Tensor& hidden, int64_t heads,
                   int64_t key_heads, int64_t dim) {
  const int64_t d = hidden.size(2), inner = weights[kGate].size(0), wide = heads * dim;
  const int64_t narrow = key_heads * dim;
  const int64_t sizes[kProducts][2] = {{wide, d},  {narrow, d}, {narrow, d}, {d, wide},
                                       {inner, d}, {inner, d},  {d, inner}};
  for (int i = 0; i < kProducts; ++i) {
    const Tensor &w = weights[i], &b = biases[i];
    STD_TORCH_CHECK(w.is_cpu() && w.scalar_type() == hidden.scalar_type() &&
                        w.size(0) == sizes[i][0] && w.size(1) == sizes[i][1] &&
                        (w.size(1) <= 1 || w.stride(1) == 1),
                    "decoder_layer: weights[", i, "]: expected ", name_of(hidden.scalar_type()),
                    " [", sizes[i][0], ", ", sizes[i][1], "] with dense rows, got ",
                    name_of(w.scalar_type()), " ", shape_of(w));
    STD_TORCH_CHECK(b.numel() == 0 || (b.is_cpu() && b.scalar_type() == hidden.scalar_type() &&
                                       b.numel() == w.size(0) && b.is_contiguous()),
                    "decoder_layer: biases[", i, "]: expected a contiguous ",
                    name_of(hidden.scalar_type()), " [", w.size(0), "] or nothing, got ",
                    name_of(b.scalar_type()), " ", shape_of(b));
  }
  for (const Tensor& norm : norms) {
    STD_TORCH_CHECK(norm.is_cpu() && norm.scalar_type() == hidden.scalar_type() &&
                        norm.dim() == 1 && norm.size(0) == d && norm.is_contiguous(),
                    "decoder_layer: norms: expected contiguous ", name_of(hidden.scalar_type()),
                    " [", d, "], got ", name_of(norm.scalar_type()), " ", shape_of(norm));
  }
}

std::vector<Lora> loras_of(const Layer& layer, const std::vector<Tensor>& tensors,
                           const std::vector<int64_t>& places,
                           const std::vector<double>& scalings, int64_t streams) {
  const size_t count = scalings.size();
  STD_TORCH_CHECK(tensors.size() == 2 * count && places.size() == 2 * count && streams > 0 &&
                      layer.rows % streams == 0,
                  "decoder_layer: lora, places, scalings: expected A and B, product and stream of "
                  "each adapter, and as many rows in each of ", streams, " streams");
  std::vector<Lora> loras(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor &a = tensors[2 * i], &b = tensors[2 * i + 1];
    const int64_t product = places[2 * i], stream = places[2 * i + 1];
    const ScalarType type = a.scalar_type();
    STD_TORCH_CHECK(product >= 0 && product < kProducts && stream >= 0 && stream < streams,
                    "decoder_layer: places: there is no product ", product, " or stream ", stream);
    STD_TORCH_CHECK(
        a.is_cpu() && b.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16) &&
            b.scalar_type() == type && a.dim() == 2 && b.dim() == 2 &&
            a.size(1) == layer.into(product) && b.size(0) == layer.out_of(product) &&
            a.size(0) == b.size(1) && (a.size(1) <= 1 || a.stride(1) == 1) &&
            (b.size(1) <= 1 || b.stride(1) == 1),
        "decoder_layer: lora: expected dense float32 or bfloat16 A [r, ", layer.into(product),
        "] and B [", layer.out_of(product), ", r], got ", shape_of(a), " and ", shape_of(b));
    Lora& lora = loras[i];
    lora.product = static_cast<int>(product);
    lora.job.a = static_cast<const char*>(a.const_data_ptr());
    lora.job.b = static_cast<const char*>(b.const_data_ptr());
    lora.job.a_stride = a.stride(0);
    lora.job.b_stride = b.stride(0);
    lora.job.k = a.size(1);
    lora.job.o = b.size(0);
    lora.job.r = a.size(0);
    lora.job.scaling = static_cast<float>(scalings[i]);
    lora.run = lora_for(layer.isa, layer.dtype, type == ScalarType::Float ? DType::f32 : DType::bf16);
    const int64_t each = layer.rows / streams;
    lora.first = stream * each;
    lora.end = lora.job.r > 0 ? lora.first + each : lora.first;
  }
  return loras;
}

}  // namespace

Tensor decoder_layer(Tensor hidden, Tensor cos, Tensor sin, Tensor keys, Tensor values,
                     std::optional<Tensor> mask, std::vector<Tensor> norms,
                     std::vector<double> eps, std::vector<Tensor> weights,
                     std::vector<Tensor> biases, std::vector<Tensor> lora,
                     std::vector<int64_t> places, std::vector<double> scalings, int64_t streams,
                     double scaling, int64_t isa) {
  Layer layer;
  layer.dtype = layer_dtype(hidden, "decoder_layer: hidden");
  layer.element = bytes_of(layer.dtype);
  layer.isa = isa;
  STD_TORCH_CHECK(hidden.dim() == 3 && hidden.size(1) == 1 && hidden.is_contiguous(),
                  "decoder_layer: hidden: expected a contiguous [rows, 1, D], got ",
                  shape_of(hidden));
  STD_TORCH_CHECK(norms.size() == 2 && eps.size() == 2 && weights.size() == kProducts &&
                      biases.size() == kProducts,
                  "decoder_layer: expected two norms and seven products");
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(w.dim() == 2, "decoder_layer: weights: expected [O, K], got ", shape_of(w));
  }
  const int64_t rows = layer.rows = hidden.size(0), columns = hidden.size(2), e = layer.element;
  RotaryJob turn;
  turn.cos = angles(cos, "cos", hidden, e, turn.cos_strides);
  turn.sin = angles(sin, "sin", hidden, e, turn.sin_strides);
  const int64_t dim = cos.size(2);
  STD_TORCH_CHECK(dim > 0 && sin.size(2) == dim, "decoder_layer: sin: expected the shape of cos");
  turn.half = dim / 2;
  check_cache(keys, "keys", hidden, dim);
  check_cache(values, "values", hidden, dim);
  const int64_t heads = weights[kQ].size(0) / dim, key_heads = keys.size(1), tokens = keys.size(2);
  STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0 && same_shape(keys, values),
                  "decoder_layer: keys, values: expected alike, with a divisor of ", heads,
                  " heads, got ", shape_of(keys), " and ", shape_of(values));
  check_weights(weights, biases, norms, hidden, heads, key_heads, dim);
  layer.weights = weights.data();
  layer.biases = biases.data();
  layer.loras = loras_of(layer, lora, places, scalings, streams);
  QueryJob query = {};
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool &&
                        mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == rows) &&
                        mask->size(1) == 1 && mask->size(2) == 1 && mask->size(3) == tokens,
                    "decoder_layer: mask: expected bool [1 or rows, 1, 1, ", tokens, "], got ",
                    shape_of(*mask));
    query.mask = static_cast<const bool*>(mask->const_data_ptr());
    query.mask_strides[0] = mask->size(0) == 1 ? 0 : mask->stride(0);
    query.mask_strides[1] = mask->stride(3);
  }
  Tensor result = new_rows(hidden, columns);
  if (rows == 0) return result;

  const int64_t wide = heads * dim, narrow = key_heads * dim, inner = weights[kGate].size(0);
  thread_local std::vector<char> memory;
  const size_t bytes = rows * (2 * columns + 2 * wide + 2 * narrow + 2 * inner) * e;
  if (memory.size() < bytes) memory.resize(bytes);
  char* next = memory.data();
  const auto room = [&](int64_t width) {
    char* at = next;
    next += rows * width * e;
    return at;
  };
  char *normed = room(columns), *made = room(columns), *q = room(wide), *turned = room(wide);
  char *k = room(narrow), *v = room(narrow), *gate = room(inner), *up = room(inner);
  char* in = static_cast<char*>(const_cast<void*>(hidden.const_data_ptr()));
  char* out = static_cast<char*>(result.mutable_data_ptr());
  const DecoderTable& table =
      QADAPTER_FOR_ISA(choose_isa(isa), decoder_tables)[static_cast<int>(layer.dtype)];

  norm_rows(layer, in, norms[0], eps[0], normed);
  char* const qkv[3] = {q, k, v};
  multiply(layer, kQ, 3, normed, qkv);
  put_last(layer, v, values);
  rotate(layer, turn, k, v, key_heads);
  put_last(layer, v, keys);
  rotate(layer, turn, q, turned, heads);

  query.q = turned;
  query.out = q;
  query.keys = static_cast<const char*>(keys.const_data_ptr());
  query.values = static_cast<const char*>(values.const_data_ptr());
  for (int d = 0; d < 3; ++d) {
    query.key_strides[d] = keys.stride(d) * e;
    query.value_strides[d] = values.stride(d) * e;
  }
  query.heads = heads;
  query.groups = heads / key_heads;
  query.tokens = tokens;
  query.dim = dim;
  query.scaling = static_cast<float>(scaling);
  for_each_piece(rows * key_heads, tokens * dim * query.groups, [&](int64_t i) {
    thread_local std::vector<float> own;
    const size_t floats = static_cast<size_t>(query_memory(query));
    if (own.size() < floats) own.resize(floats);
    table.queries(query, i, i + 1, own.data());
  });

  multiply(layer, kO, 1, q, &made);
  table.sum(in, made, out, rows * columns);
  norm_rows(layer, out, norms[1], eps[1], normed);
  char* const gate_up[2] = {gate, up};
  multiply(layer, kGate, 2, normed, gate_up);
  const SiluJob silu = {gate, up, nullptr, gate, nullptr};
  const SiluElements run = silu_for(isa, layer.dtype).fwd;
  const int64_t count = rows * inner;
  for_each_piece((count + kLayerPiece - 1) / kLayerPiece, kLayerPiece, [&](int64_t i) {
    run(silu, i * kLayerPiece, std::min(count, (i + 1) * kLayerPiece));
  });
  multiply(layer, kDown, 1, gate, &made);
  table.sum(out, made, out, rows * columns);
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def(
      "decoder_layer(Tensor hidden, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor? mask, Tensor[] norms, float[] eps, Tensor[] weights, Tensor[] biases, Tensor[] lora, "
      "int[] places, float[] scalings, int streams, float scaling, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("decoder_layer", TORCH_BOX(&decoder_layer));
}

}  // namespace qadapter
