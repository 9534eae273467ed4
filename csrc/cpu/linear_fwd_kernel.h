// The vector code of linear_fwd; linear_fwd.cpp has the maths and the model. Included once per
// instruction set, after gemm_kernel.h, hence no include guard and no includes.

namespace {

// Rows of a block, filled up to a multiple of kRowUnit, in panels of at most kMr, as equal as
// possible.
struct Panels {
  int64_t rows, count;

  explicit Panels(int64_t rows_)
      : rows(round_up(rows_, kRowUnit)), count((rows + kMr - 1) / kMr) {}
  int64_t first(int64_t panel) const { return panel * (rows / kRowUnit) / count * kRowUnit; }
  int height(int64_t panel) const { return static_cast<int>(first(panel + 1) - first(panel)); }
};

// Steps to sum over `n` elements in, with zeros behind.
inline int64_t steps_of(int64_t n) {
  return round_up(n, kStep * kLeftSteps) / kStep;
}

template <class T>
class Walk {
  using F = Simd::F;
  using Element = Product::Element;
  static constexpr int kTogether = kLeftSteps * kStep;  // elements of a row of the left side
  static constexpr int kLongest = std::max(16, kTogether);

 public:
  static LinearMemory memory(const LinearJob& job, int64_t rows) {
    const int64_t steps = steps_of(job.dim);
    rows = round_up(rows, kRowUnit);
    LinearMemory m;
    m.streams = job.two ? 2 : 1;
    m.left = round_up(rows * steps, 16);
    m.tile = rows * kTileStride;
    m.sums = job.need_grad ? round_up(round_up(job.dim, kNr) * rows, 16) : 0;
    m.panel = std::max<int64_t>(round_up(std::min<int64_t>(steps, kDepth), Simd::kWidth),
                                kTile / kStep) *
              kNr;
    m.vectors = 2 * kTile + 2 * round_up(job.dim, kLongest);
    return m;
  }

  Walk(const LinearJob& job_, int64_t first_, int64_t count_, float* memory_, LinearRow* rows_)
      : job(job_), first(first_), count(count_), panels(count_), rows(rows_) {
    const LinearMemory m = memory(job, count);
    steps = steps_of(job.dim);
    const int64_t cuts = (steps + kDepth - 1) / kDepth;
    depth = round_up((steps + cuts - 1) / cuts, kLeftSteps);
    const auto take = [&memory_](int64_t n) {
      float* at = memory_;
      memory_ += n;
      return at;
    };
    left_q = take(m.left);
    tile_q = take(m.tile);
    left_b = job.two ? take(m.left) : nullptr;
    tile_b = job.two ? take(m.tile) : nullptr;
    sums = take(m.sums);
    panel = take(m.panel);
    slopes = take(kTile);
    bias = take(kTile);
    vector = take(round_up(job.dim, kLongest));
    other = take(round_up(job.dim, kLongest));
    std::fill(bias, other, 0.0f);
  }

  const float* run() {
    [[maybe_unused]] const Tiles tiles{};
    for (int64_t i = 0; i < count; ++i) rows[i] = {Partial(), Partial(), 0, 0, 0, 1};
    if (job.action_dot) {
      if (job.base.data) {
        pack_left(job.base, nullptr, left_q);
        action_products(&LinearRow::z_b);
      }
      pack_left(job.q, nullptr, left_q);
      action_products(&LinearRow::z_q);
      if (job.merged) pack_left(job.q, &job.base, left_q);
    } else {
      pack_left(job.q, nullptr, left_q);
      if (job.two) pack_left(job.base, nullptr, left_b);
    }
    if (job.need_grad) std::memset(sums, 0, round_up(job.dim, kNr) * panels.rows * sizeof(float));
    for (int64_t column = 0; column < job.vocab; column += kTile) {
      tile(column, static_cast<int>(std::min<int64_t>(kTile, job.vocab - column)));
    }
    return sums;
  }

 private:
  const T* weight(int64_t row) const {
    return reinterpret_cast<const T*>(job.weight.data) + row * job.weight.stride;
  }

  // h, or h + m h_other rounded once, into [panel][k / kLeftSteps][rows of the panel][kLeftSteps];
  // rows that fill the block up are zeros
  void pack_left(const Matrix& h, const Matrix* h_other, float* out) {
    std::memset(out, 0, panels.rows * steps * sizeof(float));
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t start = panels.first(p), height = panels.height(p);
      Element* at = reinterpret_cast<Element*>(out + start * steps);
      for (int64_t i = 0; i < std::min(height, count - start); ++i) {
        const int64_t row = first + start + i;
        widen(h, row, job.dim, vector);
        if (h_other != nullptr) {
          widen(*h_other, row, job.dim, other);
          for (int64_t k = 0; k < job.dim; ++k) vector[k] += job.m * other[k];
        }
        for (int64_t k = 0; k < job.dim; k += kTogether) {  // vector has zeros behind
          Element* to = at + k * height + i * kTogether;
          for (int j = 0; j < kTogether; ++j) to[j] = Product::round(vector[k + j]);
        }
      }
    }
  }

  // c[row][0 .. kNr) = left . the kNr given rows of W, for the panels from .. to
  void logits(const T* const* columns, const float* left, int64_t from, int64_t to, float* c) {
    for (int64_t k = 0; k < steps; k += depth) {
      const int64_t now = pack_depth(columns, k);
      Ahead ahead = nothing();
      multiply_panels(left, k, now, from, to, c, ahead);
    }
  }

  // Packs steps k .. k + depth of columns; returns how many there are.
  int64_t pack_depth(const T* const* columns, int64_t k) {
    const int64_t now = std::min(depth, steps - k);
    pack_columns(columns, k * kStep, std::min(now * kStep, job.dim - k * kStep), panel);
    return now;
  }

  void multiply_panels(const float* left, int64_t k, int64_t now, int64_t from, int64_t to,
                       float* c, Ahead& ahead) {
    for (int64_t p = from; p < to; ++p) {
      const int height = panels.height(p);
      const int64_t start = panels.first(p);
      multiply_rows<Left::packed>(height, now, left + start * steps + k * height, panel,
                                  c + start * kTileStride, kTileStride, k > 0, ahead);
      ahead.at += ahead.pace * now;
    }
  }

  bool has_action(int64_t i) const {
    if (i >= count) return false;
    const int64_t a = job.actions[first + i];
    return a >= 0 && a < job.vocab;
  }

  // h . W[a], by the arithmetic that gives the logits: the diagonal of products with gathered rows
  void action_products(float LinearRow::*field) {
    for (int64_t p = 0; p < panels.count; ++p) {
      const T* columns[kNr] = {};
      const int64_t start = panels.first(p);
      const int height = panels.height(p);
      for (int i = 0; i < height; ++i) {
        if (has_action(start + i)) columns[i] = weight(job.actions[first + start + i]);
      }
      logits(columns, left_q, p, p + 1, tile_q);
      for (int i = 0; i < height; ++i) {
        const int64_t row = start + i;
        if (!has_action(row)) continue;
        float one[Simd::kGroup] = {tile_q[row * kTileStride + i]};
        float slope[Simd::kGroup];
        if (job.bias) bias[0] = job.bias[job.actions[first + row]];
        finish(one, Simd::kGroup, slope);
        rows[row].*field = one[0];
        rows[row].slope = slope[0];
      }
    }
  }

  // Raw products to logits: bias, scale, soft-cap. Not inlined: both streams must get the same
  // instructions, that equal streams give equal bits.
  __attribute__((noinline)) void finish(float* s, int n, float* slope) {
    const F scale = Simd::set1(job.scale);
    if (job.bias) {
      for (int j = 0; j < n; j += Simd::kWidth) {
        const F biased = Simd::add(Simd::load1(s + j), Simd::load1(bias + j));
        Simd::store1(s + j, Simd::mul(biased, scale));
      }
    } else if (job.scale != 1.0f) {
      for (int j = 0; j < n; j += Simd::kWidth) {
        Simd::store1(s + j, Simd::mul(Simd::load1(s + j), scale));
      }
    }
    if (job.cap == 0.0f) {
      slope[0] = 1.0f;
      return;
    }
    // t = tanh(s / cap) = (1 - e) / (1 + e), or a polynomial where that cancels
    const Simd::Exp2 exp2;
    const F one = Simd::set1(1.0f), cap = Simd::set1(job.cap), inverse = Simd::set1(1 / job.cap);
    for (int j = 0; j < n; j += Simd::kWidth) {
      const F y = Simd::mul(Simd::load1(s + j), inverse), size = Simd::abs(y);
      const F e = exp2.value(Simd::mul(size, Simd::set1(-2.0f * static_cast<float>(kLog2E))));
      const F d = Simd::div(one, Simd::add(one, e));
      const F w = Simd::mul(y, y);
      F small = Simd::fma(w, Simd::set1(0x1.3337fcp-6f), Simd::set1(-0x1.b6cc16p-5f));
      small = Simd::fma(w, small, Simd::set1(0x1.110610p-3f));
      small = Simd::fma(w, small, Simd::set1(-0x1.55553ep-2f));
      small = Simd::fma(Simd::mul(w, small), size, size);
      const F large = Simd::mul(Simd::sub(one, e), d);
      const F t = Simd::with_sign_of(Simd::pick_less(size, Simd::set1(0.4f), small, large), y);
      Simd::store1(s + j, Simd::mul(t, cap));
      Simd::store1(slope + j, Simd::mul(Simd::mul(Simd::set1(4.0f), e), Simd::mul(d, d)));
    }
  }

  // x = z_q + m z_b, over z_q
  __attribute__((noinline)) void mix(float* q, const float* b, int n) {
    const F m = Simd::set1(job.m);
    for (int j = 0; j < n; j += Simd::kWidth) {
      F other_stream = Simd::load1(b + j);
      if (job.mix == Mix::negative) other_stream = Simd::flip_neg_inf(other_stream);
      Simd::store1(q + j, Simd::fma(m, other_stream, Simd::load1(q + j)));
    }
  }

  static float largest(const float* x, int n, float at_least) {
    F best = Simd::set1(at_least), best2 = best;
    for (int j = 0; j < n; j += Simd::kGroup) {
      best = Simd::max_into(best, Simd::load1(x + j));
      best2 = Simd::max_into(best2, Simd::load1(x + j + Simd::kWidth));
    }
    return Simd::reduce_max(Simd::max_into(best, best2));
  }

  // Adds the exponentials of a row of the tile; puts them where asked to, over x.
  template <bool PUT, bool SLOPE>
  static float add_exps(float* x, int n, float max_, float scale, const float* slope) {
    const Simd::Decay decay(scale);
    const F max = Simd::set1(max_);
    F sum[2] = {Simd::zero(), Simd::zero()};
    Element* out = reinterpret_cast<Element*>(x);
    for (int j = 0; j < n; j += Simd::kGroup) {
      F p[2];
      for (int k = 0; k < 2; ++k) {
        p[k] = decay.value_and_add(Simd::sub(max, Simd::load1(x + j + k * Simd::kWidth)), sum[k]);
        if (SLOPE) p[k] = Simd::mul(p[k], Simd::load1(slope + j + k * Simd::kWidth));
      }
      if (PUT) Product::put(out + j, p[0], p[1]);
    }
    return Simd::reduce_add(Simd::add(sum[0], sum[1]));
  }

  // Returns by what earlier sums were multiplied.
  static double raise(Partial& total, float max, double scale) {
    if (!(max > total.max)) return 1.0;
    const double factor = std::exp2((static_cast<double>(total.max) - max) * scale);
    total.rescale_to(max, scale);
    return factor;
  }

  void pad(float* x, int columns, int n) {
    for (int j = columns; j < n; ++j) x[j] = -__builtin_inff();
  }

  void rescale_sums(int64_t row, float factor) {
    const F by = Simd::set1(factor);
    for (int64_t d = 0; d < job.dim; d += kNr) {
      float* at = sums + d * panels.rows + row * kNr;
      for (int j = 0; j < kNr; j += Simd::kWidth) {
        Simd::store1(at + j, Simd::mul(Simd::load1(at + j), by));
      }
    }
  }

  void statistics(int64_t i, int64_t column, int columns) {
    const int n = static_cast<int>(round_up(columns, Simd::kGroup));
    LinearRow& row = rows[i];
    float *q = tile_q + i * kTileStride, *b = tile_b + i * kTileStride;
    const int64_t a = job.actions[first + i] - column;
    const bool here = has_action(i) && a >= 0 && a < columns;
    if (job.two) {
      finish(b, n, slopes);
      pad(b, columns, n);
      if (here) row.z_b = b[a];
      if (job.base_sum) {
        const float scale = static_cast<float>(kLog2E);
        raise(row.base, largest(b, n, row.base.max), scale);
        row.base.sum += add_exps<false, false>(b, n, row.base.max, scale, nullptr);
      }
    }
    finish(q, n, slopes);
    pad(q, columns, n);
    if (here && !job.action_dot) {
      row.z_q = q[a];
      if (job.cap != 0.0f) row.slope = slopes[a];
    }
    if (job.mix != Mix::none && !job.merged) mix(q, b, n);
    if (here) row.x_a = q[a];
    const double factor = raise(row.x, largest(q, n, row.x.max), job.x_scale);
    if (!job.need_grad) {
      row.x.sum += add_exps<false, false>(q, n, row.x.max, job.x_scale, nullptr);
      return;
    }
    if (factor != 1.0 && column > 0) rescale_sums(i, static_cast<float>(factor));
    row.x.sum += job.cap != 0.0f ? add_exps<true, true>(q, n, row.x.max, job.x_scale, slopes)
                                 : add_exps<true, false>(q, n, row.x.max, job.x_scale, nullptr);
    if (here) std::memset(reinterpret_cast<Element*>(q) + a, 0, sizeof(Element));
  }

  void tile(int64_t column, int columns) {
    if (job.bias) {
      for (int j = 0; j < columns; ++j) {
        const float x = job.bias[column + j];
        bias[j] = job.merged && x != -__builtin_inff() ? x * job.bias_factor : x;
      }
    }
    for (int at = 0; at < columns; at += kNr) {
      const T* rows_of_w[kNr] = {};
      for (int j = 0; j < std::min(kNr, columns - at); ++j) rows_of_w[j] = weight(column + at + j);
      Ahead ahead = next_columns(column + at + kNr);
      for (int64_t k = 0; k < steps; k += depth) {
        const int64_t now = pack_depth(rows_of_w, k);
        if (job.two) multiply_panels(left_b, k, now, 0, panels.count, tile_b + at, ahead);
        multiply_panels(left_q, k, now, 0, panels.count, tile_q + at, ahead);
      }
    }
    for (int64_t i = 0; i < count; ++i) statistics(i, column, columns);
    if (job.need_grad) add_weights(column, columns);
  }

  Ahead nothing() const { return {reinterpret_cast<const char*>(panel), 0}; }

  // The rows of W from `column` on, spread over the products with the panel before them.
  Ahead next_columns(int64_t column) const {
    const int64_t bytes = std::min<int64_t>(kNr, job.vocab - column) * job.weight.stride *
                          static_cast<int64_t>(sizeof(T));
    if (bytes <= 0 || job.weight.stride > 2 * job.dim) {
      return nothing();
    }
    const int64_t turns = (job.two ? 2 : 1) * panels.count * steps;
    return {reinterpret_cast<const char*>(weight(column)), (bytes + turns - 1) / turns};
  }

  // sums += p W for the columns of the tile. The next panel's lines lie a row of W apart; they are
  // fetched on the way, a row a step.
  void add_weights(int64_t column, int columns) {
    constexpr int64_t kLine = kNr * sizeof(T);
    const int64_t k = steps_of(columns);
    const int64_t stride = job.weight.stride * static_cast<int64_t>(sizeof(T));
    for (int64_t d = 0; d < job.dim; d += kNr) {
      pack_rows(weight(column), job.weight.stride, columns, d,
                std::min<int64_t>(kNr, job.dim - d), k, panel);
      const char* next = reinterpret_cast<const char*>(weight(column) + d + kNr);
      int64_t next_row = 0, line = 0;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t start = panels.first(p);
        Ahead ahead = nothing();
        if (d + kNr < job.dim && line < kLine) {
          ahead = {next + next_row * job.weight.stride * sizeof(T) + line, stride};
          next_row += k;
          if (next_row + k > columns) next_row = 0, line += 64;
        }
        multiply_rows<Left::rows>(panels.height(p), k, tile_q + start * kTileStride, panel,
                                  sums + d * panels.rows + start * kNr, kNr, true, ahead);
      }
    }
  }

  const LinearJob& job;
  const int64_t first, count;
  const Panels panels;
  LinearRow* rows;
  int64_t steps, depth;
  float *left_q, *left_b, *tile_q, *tile_b, *sums, *panel, *slopes, *bias, *vector, *other;
};

template <class T>
const float* walk(const LinearJob& job, int64_t first, int64_t count, float* memory,
                  LinearRow* rows) {
  return Walk<T>(job, first, count, memory, rows).run();
}

template <class T>
constexpr LinearKernel linear_kernel() {
  return {kMr, kRowUnit, kMostRows, kNr, &Walk<T>::memory, &walk<T>};
}

}  // namespace
