// Causal attention of a pack of sequences, some of which share a prompt, and its gradients.
//
//   s = scaling q k^T      p = softmax of s over the keys that a query sees      out = p v
//   dv = p^T g     dp = g v^T     ds = scaling p (dp - rowsum(p dp))     dq = ds k     dk = ds^T q
//
// One call for all sequences and heads of a layer, where matrix products would be a loop of calls
// over small matrices. Scores are float32 and stay in the cache, 32 queries by all of their keys at
// a time; what no query of a block sees is left out, half of a causal square. p and ds are rounded
// to bfloat16 once, for the products with them; sums are float32, as in PyTorch's fused attention.
// Backward makes the scores again, from the log-sum-exp of each query.
//
// Work, for n queries that see n / 2 keys on average, d elements and a head: 2 n^2 d operations
// forward, 5 n^2 d backward, and n^2 / 2 exponentials each. Bytes: q, k, v, out once, and backward
// the gradients beside them.
//
// In bfloat16, by AMX or AVX512_BF16, heads of a multiple of 32 elements; there is no other vector
// code, and elsewhere qadapter.model.cpu_attention takes products. The two differ in the block of 32
// by 32 sums that all products are made of. The sums over the queries that see a key
// are one thread's, in one order, so that threads change nothing; what a sequence gives depends on
// no other.

#include "cpu/varlen_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/drivers.h"
#include "cpu/isa.h"
#include "cpu/layer_rows.h"

#if QADAPTER_X86
#include "cpu/simd_plain.h"
#include "cpu/isa_begin_avx512.h"
#include "cpu/simd_avx512.h"
#include "cpu/isa_end.h"

#include "cpu/isa_begin_amx.h"
namespace qadapter {
namespace amx {
using Simd = avx512::Simd;
#include "cpu/amx_tiles.h"
#include "cpu/varlen_block_amx.h"
#include "cpu/varlen_tiles.h"
#include "cpu/varlen_attention_kernel.h"
const AttentionKernel attention = attention_kernel();
}  // namespace amx
}  // namespace qadapter
#include "cpu/isa_end.h"

#include "cpu/isa_begin_avx512_bf16.h"
namespace qadapter {
namespace avx512_bf16 {
using Simd = avx512::Simd;
#include "cpu/dot_tiles.h"
#include "cpu/varlen_block_dot.h"
#include "cpu/varlen_tiles.h"
#include "cpu/varlen_attention_kernel.h"
const AttentionKernel attention = attention_kernel();
}  // namespace avx512_bf16
}  // namespace qadapter
#include "cpu/isa_end.h"
#endif

namespace qadapter {
namespace {

// Of heads of `dim` elements; null where there is none.
const AttentionKernel* kernel_for(int64_t dim, int64_t isa) {
#if QADAPTER_X86
  if (dim > 0 && dim % amx::kDeep == 0 && choose_isa(isa) >= Isa::avx512_bf16) {
    return choose_isa(isa) == Isa::amx ? &amx::attention : &avx512_bf16::attention;
  }
#endif
  return static_cast<void>(dim), static_cast<void>(isa), nullptr;
}

HeadRows head_rows(const Tensor& t, const char* name, int64_t heads, int64_t tokens, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::BFloat16 && t.dim() == 3 &&
                      t.size(0) == heads && t.size(1) == tokens && t.size(2) == dim &&
                      t.stride(2) == 1,
                  "varlen_attention: ", name, ": expected bfloat16 [", heads, ", ", tokens, ", ",
                  dim, "] on the CPU, with dense rows, got ", name_of(t.scalar_type()), " ",
                  shape_of(t));
  HeadRows rows;
  rows.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  rows.head = t.stride(0) * 2;
  rows.token = t.stride(1) * 2;
  return rows;
}

VarlenJob job_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                 double scaling, int64_t window, int64_t isa) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.size(0) > 0 && q.size(0) % k.size(0) == 0,
                  "varlen_attention: q, k: expected [H, T, D] and [Hk, T, D], H a multiple of Hk, "
                  "got ", shape_of(q), " and ", shape_of(k));
  STD_TORCH_CHECK(kernel_for(q.size(2), isa), "varlen_attention: D: expected a multiple of 32, and "
                  "a CPU with AVX512_BF16 or AMX, got ", q.size(2));
  STD_TORCH_CHECK(window >= 1, "varlen_attention: window: expected 1 or more, got ", window);
  VarlenJob job;
  job.tokens = q.size(1);
  job.dim = q.size(2);
  job.group = q.size(0) / k.size(0);
  job.q = head_rows(q, "q", q.size(0), job.tokens, job.dim);
  job.k = head_rows(k, "k", k.size(0), job.tokens, job.dim);
  job.v = head_rows(v, "v", k.size(0), job.tokens, job.dim);
  job.lse = const_cast<float*>(floats(lse, q.size(0) * job.tokens));
  job.scaling = static_cast<float>(scaling);
  job.window = window;
  return job;
}

// Sequences, and the first one of each group, with the number of all behind them.
struct Pack {
  std::vector<Sequence> sequences;
  std::vector<int64_t> groups;

  Pack(const Tensor& lengths, int64_t tokens) {
    STD_TORCH_CHECK(lengths.dim() == 2 && lengths.size(1) == 2,
                    "varlen_attention: sequences: expected int64 [S, 2], got ", shape_of(lengths));
    const int64_t count = lengths.size(0), *of = int64s(lengths, 2 * count);
    int64_t token = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t prefix = of[2 * i], own = of[2 * i + 1];
      if (prefix == 0) groups.push_back(i);
      const Sequence* first = groups.empty() ? nullptr : sequences.data() + groups.back();
      STD_TORCH_CHECK(prefix >= 0 && own >= 0 && own <= tokens - token &&
                          (prefix == 0 || (first && prefix <= first->own)),
                      "varlen_attention: sequences: ", prefix, " shared and ", own,
                      " own tokens, at number ", i, ", do not fit into the pack");
      sequences.push_back({prefix == 0 ? token : first->start, prefix, token, own});
      token += own;
    }
    STD_TORCH_CHECK(token == tokens, "varlen_attention: sequences: expected ", tokens,
                    " own tokens in all, got ", token);
    groups.push_back(count);
  }
};

char* memory_of(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (memory.size() < static_cast<size_t>(bytes + 64)) memory.resize(bytes + 64);
  char* data = memory.data();
  return data + (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64;
}

}  // namespace

void varlen_attention_fwd_(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor sequences,
                           double scaling, int64_t window, int64_t isa) {
  VarlenJob job = job_of(q, k, v, lse, scaling, window, isa);
  job.out = head_rows(out, "out", q.size(0), job.tokens, job.dim);
  const Pack pack(sequences, job.tokens);
  const AttentionKernel& run = *kernel_for(job.dim, isa);
  const int64_t heads = k.size(0), count = static_cast<int64_t>(pack.sequences.size());
  for_each_piece(heads * count, job.tokens * job.group * job.dim, [&](int64_t piece) {
    const Sequence& s = pack.sequences[piece / heads];
    run.forward(job, s, piece % heads, memory_of(run.forward_memory(job, s)));
  });
}

void varlen_attention_bwd_(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad, Tensor q,
                           Tensor k, Tensor v, Tensor lse, Tensor sequences, double scaling,
                           int64_t window, int64_t isa) {
  VarlenJob job = job_of(q, k, v, lse, scaling, window, isa);
  const int64_t heads = k.size(0);
  job.grad = head_rows(grad, "grad", q.size(0), job.tokens, job.dim);
  job.grad_q = head_rows(grad_q, "grad_q", q.size(0), job.tokens, job.dim);
  job.grad_k = head_rows(grad_k, "grad_k", heads, job.tokens, job.dim);
  job.grad_v = head_rows(grad_v, "grad_v", heads, job.tokens, job.dim);
  const Pack pack(sequences, job.tokens);
  const AttentionKernel& run = *kernel_for(job.dim, isa);
  const int64_t groups = static_cast<int64_t>(pack.groups.size()) - 1;
  for_each_piece(heads * groups, job.tokens * job.group * job.dim, [&](int64_t piece) {
    const Sequence* first = pack.sequences.data() + pack.groups[piece / heads];
    const Sequence* end = pack.sequences.data() + pack.groups[piece / heads + 1];
    int64_t tokens = 0, most = 0;
    for (const Sequence* s = first; s < end; ++s) tokens += s->own;
    for (const Sequence* s = first; s < end; ++s) {
      most = std::max(most, run.backward_memory(job, *s, tokens));
    }
    run.backward(job, first, end, piece % heads, first->start, tokens, memory_of(most));
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def(
      "varlen_attention_fwd_(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor "
      "sequences, float scaling, int window, int isa) -> ()");
  library.def(
      "varlen_attention_bwd_(Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor grad, "
      "Tensor q, Tensor k, Tensor v, Tensor lse, Tensor sequences, float scaling, int window, int "
      "isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("varlen_attention_fwd_", TORCH_BOX(&varlen_attention_fwd_));
  library.impl("varlen_attention_bwd_", TORCH_BOX(&varlen_attention_bwd_));
}

}  // namespace qadapter
