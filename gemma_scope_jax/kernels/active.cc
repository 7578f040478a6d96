// The sparse half of a coder's training step on CPUs, as XLA FFI handlers: see active.py.
//
// XLA has no gather-multiply-add that does not write the gathered rows to memory first, which costs
// several times the product with a dense encoder. All arrays are dense and row-major; S sources
// (coders or layers read), B tokens, K entries per token, F features, P decoders, T targets,
// M feature groups, E outputs. No sum depends on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Span = ffi::Span<const int64_t>;

// Calls work(i) for i in [0, blocks) on the pool's threads and on this one, which may itself be one
// of the pool's: it waits only for blocks that some thread has begun, never for a thread to start.
template <class Work>
static void each(ffi::ThreadPool& pool, int64_t blocks, const Work& work) {
  struct Progress {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all;
  };
  auto progress = std::make_shared<Progress>();
  auto run = [progress, blocks, &work] {  // a late start finds no block, and leaves `work` alone
    int64_t mine = 0;
    for (int64_t i; (i = progress->next.fetch_add(1)) < blocks; ++mine) work(i);
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(progress->mutex);
    if ((progress->done += mine) == blocks) progress->all.notify_all();
  };
  for (int64_t n = std::min(pool.num_threads(), blocks) - 1; n > 0; --n) {
    auto copy = run;
    pool.Schedule(std::move(copy));
  }
  run();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all.wait(lock, [&] { return progress->done == blocks; });
}

static int64_t split(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Asks for large pages under an array about to be written: it is fresh memory as a rule, and to
// touch that 4 KB at a time takes longer than the arithmetic.
static void large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// ---- rows ------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline Lanes lanes(const float* p) { return *reinterpret_cast<const Lanes*>(p); }

// y += sum of a[i] * rows[i]
static void add_rows(float* __restrict y, const float* const* rows, const float* a, int64_t n,
                     int64_t size) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float *r0 = rows[i], *r1 = rows[i + 1], *r2 = rows[i + 2], *r3 = rows[i + 3];
    const float a0 = a[i], a1 = a[i + 1], a2 = a[i + 2], a3 = a[i + 3];
    const float* const* next = i + 8 <= n ? rows + i + 4 : rows + i;
    int64_t e = 0;
    for (; e + 16 <= size; e += 16) {
      for (int j = 0; j < 4; ++j) __builtin_prefetch(next[j] + e);
      for (int64_t d = e; d < e + 16; ++d) {
        y[d] += (a0 * r0[d] + a1 * r1[d]) + (a2 * r2[d] + a3 * r3[d]);
      }
    }
    for (; e < size; ++e) {
      y[e] += (a0 * r0[e] + a1 * r1[e]) + (a2 * r2[e] + a3 * r3[e]);
    }
  }
  for (; i < n; ++i) {
    const float* r = rows[i];
    const float a0 = a[i];
    for (int64_t e = 0; e < size; ++e) y[e] += a0 * r[e];
  }
}

static inline float total(Lanes sum) {
  float out = 0;
  for (int i = 0; i < kLanes; ++i) out += sum[i];
  return out;
}

// out[i] = dot of a[i] and rows[i], for four of them; the rows of `next` come next
static void four_dots(float* out, const float* const* a, const float* const* rows,
                     const float* const* next, int64_t size) {
  Lanes sum[4][2] = {};
  int64_t e = 0;
  for (; e + 16 <= size; e += 16) {
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(next[i] + e);
      for (int64_t d = 0; d < 16; d += kLanes) {
        sum[i][d / kLanes % 2] += lanes(a[i] + e + d) * lanes(rows[i] + e + d);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    float value = total(sum[i][0] + sum[i][1]);
    for (int64_t d = e; d < size; ++d) value += a[i][d] * rows[i][d];
    out[i] = value;
  }
}

// ---- the active entries of z + bias -----------------------------------------------------------

// Bit i: z[i] + bias[i] > low[i], for 16 of them.
static inline uint32_t above(const float* z, const float* bias, const float* low) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_add_ps(_mm512_loadu_ps(z), _mm512_loadu_ps(bias)),
                            _mm512_loadu_ps(low), _CMP_GT_OQ);
#elif defined(__AVX2__)
  auto half = [&](int i) {
    __m256 sum = _mm256_add_ps(_mm256_loadu_ps(z + i), _mm256_loadu_ps(bias + i));
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(sum, _mm256_loadu_ps(low + i), _CMP_GT_OQ)));
  };
  return half(0) | half(8) << 8;
#else
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t(z[i] + bias[i] > low[i]) << i;
  return mask;
#endif
}

// z [S,B,F], bias and low [S,F] -> values [S,B,K], feature [S,B,K], count [S,B]
static ffi::Error Compact(ffi::ThreadPool pool, Floats z, Floats bias, Floats low,
                          ffi::Result<Floats> values, ffi::Result<Ints> feature,
                          ffi::Result<Ints> count) {
  const auto shape = z.dimensions();
  const int64_t B = shape[1], F = shape[2], K = values->dimensions()[2];
  constexpr int64_t kTokens = 16, kFeatures = 4096;  // bias and low of a tile stay in L1 or L2
  const int64_t per_source = split(B, kTokens);
  each(pool, shape[0] * per_source, [&](int64_t block) {
    const int64_t s = block / per_source, first = block % per_source * kTokens;
    const int64_t last = std::min(B, first + kTokens);
    const float *c = bias.typed_data() + s * F, *t = low.typed_data() + s * F;
    int64_t found[kTokens] = {};
    for (int64_t begin = 0; begin < F; begin += kFeatures) {
      const int64_t end = std::min(F, begin + kFeatures);
      for (int64_t b = first; b < last; ++b) {
        const float* row = z.typed_data() + (s * B + b) * F;
        float* v = values->typed_data() + (s * B + b) * K;
        int32_t* id = feature->typed_data() + (s * B + b) * K;
        int64_t n = found[b - first];
        auto take = [&](int64_t f) {
          if (n < K) v[n] = row[f] + c[f], id[n] = int32_t(f);
          ++n;
        };
        int64_t f = begin;
        for (; f + 16 <= end; f += 16) {
          for (uint32_t mask = above(row + f, c + f, t + f); mask; mask &= mask - 1) {
            take(f + __builtin_ctz(mask));
          }
        }
        for (; f < end; ++f) {
          if (row[f] + c[f] > t[f]) take(f);
        }
        found[b - first] = n;
      }
    }
    for (int64_t b = first; b < last; ++b) {
      const int64_t n = found[b - first], kept = std::min(n, K), at = (s * B + b) * K;
      std::fill(values->typed_data() + at + kept, values->typed_data() + at + K, 0.0f);
      std::fill(feature->typed_data() + at + kept, feature->typed_data() + at + K, 0);
      count->typed_data()[s * B + b] = int32_t(n);
    }
  });
  return ffi::Error::Success();
}

// Bit i: z[i] + bias[i] > low, for 16 of them.
static inline uint32_t above(const float* z, const float* bias, float low) {
  float same[16];
  std::fill(same, same + 16, low);
  return above(z, bias, same);
}

// z [S,B,F], bias [S,F] -> values [S,B,K], feature [S,B,K], count [S,B]: the K largest of a token
// that are above zero. Those seen so far raise the bar for the rest, so few are looked at twice.
static ffi::Error Largest(ffi::ThreadPool pool, Floats z, Floats bias, ffi::Result<Floats> values,
                          ffi::Result<Ints> feature, ffi::Result<Ints> count) {
  const auto shape = z.dimensions();
  const int64_t B = shape[1], F = shape[2], K = values->dimensions()[2];
  constexpr int64_t kTokens = 16;
  const int64_t per_source = split(B, kTokens);
  using Entry = std::pair<float, int32_t>;
  each(pool, shape[0] * per_source, [&](int64_t block) {
    const int64_t s = block / per_source, first = block % per_source * kTokens;
    const float* c = bias.typed_data() + s * F;
    std::vector<Entry> best;
    best.reserve(4 * K + 16);
    for (int64_t b = first; b < std::min(B, first + kTokens); ++b) {
      const float* row = z.typed_data() + (s * B + b) * F;
      float low = 0;
      best.clear();
      auto keep = [&] {
        std::nth_element(best.begin(), best.begin() + (K - 1), best.end(),
                         [](const Entry& x, const Entry& y) {
                           return x.first != y.first ? x.first > y.first : x.second < y.second;
                         });
        best.resize(K);
        low = best[K - 1].first;
      };
      int64_t f = 0;
      for (; f + 16 <= F; f += 16) {
        for (uint32_t mask = above(row + f, c + f, low); mask; mask &= mask - 1) {
          const int64_t at = f + __builtin_ctz(mask);
          best.emplace_back(row[at] + c[at], int32_t(at));
        }
        if (int64_t(best.size()) >= 4 * K) keep();
      }
      for (; f < F; ++f) {
        if (row[f] + c[f] > low) best.emplace_back(row[f] + c[f], int32_t(f));
      }
      if (int64_t(best.size()) > K) keep();
      std::sort(best.begin(), best.end(),
                [](const Entry& x, const Entry& y) { return x.second < y.second; });
      const int64_t n = best.size(), at = (s * B + b) * K;
      float* v = values->typed_data() + at;
      int32_t* id = feature->typed_data() + at;
      for (int64_t i = 0; i < n; ++i) v[i] = best[i].first, id[i] = best[i].second;
      std::fill(v + n, v + K, 0.0f);
      std::fill(id + n, id + K, 0);
      count->typed_data()[s * B + b] = int32_t(n);
    }
  });
  return ffi::Error::Success();
}

// ---- products with the decoder's rows ----------------------------------------------------------

static int64_t group(Span ends, int64_t feature) {
  return std::upper_bound(ends.begin(), ends.end() - 1, feature) - ends.begin();
}

// f, feature [S,B,K], count [S,B], w [P,F,E] -> y [T,M,B,E]; pairs: source and target of each p
static ffi::Error Decode(ffi::ThreadPool pool, Floats f, Ints feature, Ints count, Floats w,
                         ffi::Result<Floats> y, Span pairs, Span ends) {
  const auto shape = f.dimensions();
  const int64_t B = shape[1], K = shape[2], F = w.dimensions()[1], E = w.dimensions()[2];
  const int64_t T = y->dimensions()[0], M = y->dimensions()[1], P = w.dimensions()[0];
  constexpr int64_t kTokens = 16;
  large_pages(y->typed_data(), y->size_bytes());
  each(pool, split(B, kTokens), [&](int64_t block) {
    std::vector<std::vector<const float*>> rows(M);
    std::vector<std::vector<float>> scale(M);
    for (int64_t b = block * kTokens; b < std::min(B, (block + 1) * kTokens); ++b) {
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t m = 0; m < M; ++m) rows[m].clear(), scale[m].clear();
        for (int64_t p = 0; p < P; ++p) {
          if (pairs[2 * p + 1] != t) continue;
          const int64_t at = pairs[2 * p] * B + b, n = std::min<int64_t>(count.typed_data()[at], K);
          for (int64_t k = at * K; k < at * K + n; ++k) {
            const int64_t id = feature.typed_data()[k];
            const float value = f.typed_data()[k];
            if (value == 0.0f || uint64_t(id) >= uint64_t(F)) continue;
            const int64_t m = M == 1 ? 0 : group(ends, id);
            rows[m].push_back(w.typed_data() + (p * F + id) * E);
            scale[m].push_back(value);
          }
        }
        for (int64_t m = 0; m < M; ++m) {
          float* out = y->typed_data() + ((t * M + m) * B + b) * E;
          std::memset(out, 0, E * sizeof(float));
          add_rows(out, rows[m].data(), scale[m].data(), rows[m].size(), E);
        }
      }
    }
  });
  return ffi::Error::Success();
}

// feature [S,B,K], count [S,B], w [P,F,E], g [T,M,B,E] -> df [S,B,K]
static ffi::Error DecodeValues(ffi::ThreadPool pool, Ints feature, Ints count, Floats w, Floats g,
                               ffi::Result<Floats> df, Span pairs, Span ends) {
  const auto shape = feature.dimensions();
  const int64_t S = shape[0], B = shape[1], K = shape[2];
  const int64_t P = w.dimensions()[0], F = w.dimensions()[1], E = w.dimensions()[2];
  const int64_t M = g.dimensions()[1];
  constexpr int64_t kTokens = 16;
  each(pool, split(B, kTokens), [&](int64_t block) {
    for (int64_t b = block * kTokens; b < std::min(B, (block + 1) * kTokens); ++b) {
      for (int64_t s = 0; s < S; ++s) {
        const int64_t at = s * B + b, n = std::min<int64_t>(count.typed_data()[at], K);
        const int32_t* id = feature.typed_data() + at * K;
        float* out = df->typed_data() + at * K;
        std::fill(out, out + K, 0.0f);
        for (int64_t p = 0; p < P; ++p) {
          if (pairs[2 * p] != s) continue;
          const float* grad = g.typed_data() + (pairs[2 * p + 1] * M * B + b) * E;
          const float* rows = w.typed_data() + p * F * E;
          auto row = [&](int64_t k) {  // of the last entry beyond the end, of row 0 for no feature
            const int64_t f = id[std::min(k, n - 1)];
            return rows + (uint64_t(f) < uint64_t(F) ? f : 0) * E;
          };
          for (int64_t k = 0; k < n; k += 4) {
            const float *a[4], *r[4], *next[4];
            float dots[4];
            for (int i = 0; i < 4; ++i) {
              const int64_t m = M == 1 ? 0 : group(ends, id[std::min(k + i, n - 1)]);
              a[i] = grad + m * B * E, r[i] = row(k + i), next[i] = row(k + i + 4);
            }
            four_dots(dots, a, r, next, E);
            for (int i = 0; i < 4 && k + i < n; ++i) out[k + i] += dots[i];
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

// ---- the gradient of rows: the lists transposed -------------------------------------------------

struct Entry {
  int32_t token;
  float value;
};

struct Transposed {
  std::vector<int64_t> start;  // [F+1]
  std::vector<Entry> entries;
};

// The entries of one source by feature, tokens in order: a counting sort over blocks of tokens.
static Transposed transpose(ffi::ThreadPool& pool, const float* f, const int32_t* feature,
                            const int32_t* count, int64_t B, int64_t K, int64_t F) {
  const int64_t blocks = std::min<int64_t>({8, B, std::max<int64_t>(1, pool.num_threads())});
  std::vector<std::vector<int64_t>> next(blocks);
  auto visit = [&](int64_t block, auto&& entry) {
    for (int64_t b = B * block / blocks; b < B * (block + 1) / blocks; ++b) {
      for (int64_t k = b * K; k < b * K + std::min<int64_t>(count[b], K); ++k) {
        if (f[k] != 0.0f && uint64_t(feature[k]) < uint64_t(F)) entry(b, feature[k], f[k]);
      }
    }
  };
  each(pool, blocks, [&](int64_t block) {
    next[block].assign(F, 0);
    visit(block, [&](int64_t, int64_t id, float) { ++next[block][id]; });
  });
  Transposed out;
  out.start.resize(F + 1);
  int64_t total = 0;
  for (int64_t id = 0; id < F; ++id) {
    out.start[id] = total;
    for (auto& counts : next) total += std::exchange(counts[id], total);
  }
  out.start[F] = total;
  out.entries.resize(total);
  each(pool, blocks, [&](int64_t block) {
    visit(block, [&](int64_t b, int64_t id, float value) {
      out.entries[next[block][id]++] = {int32_t(b), value};
    });
  });
  return out;
}

constexpr int64_t kColumns = 16;  // of a strip: a cache line

struct Line {
  Lanes part[kColumns / kLanes] = {};
  void add(float a, const float* p) {
    for (int i = 0; i < kColumns / kLanes; ++i) part[i] += a * lanes(p + i * kLanes);
  }
};

// g [N,B,E] as strips of columns [N,E/16,B,16], padded with zeros: all tokens of one stay in L2.
static std::unique_ptr<float[]> strips(ffi::ThreadPool& pool, const float* g, int64_t N, int64_t B,
                                       int64_t E) {
  const int64_t C = split(E, kColumns), per_array = split(B, 64);
  std::unique_ptr<float[]> out(new float[N * C * B * kColumns]);
  large_pages(out.get(), N * C * B * kColumns * sizeof(float));
  each(pool, N * per_array, [&](int64_t block) {
    const int64_t n = block / per_array, first = block % per_array * 64;
    for (int64_t b = first; b < std::min(B, first + 64); ++b) {
      const float* row = g + (n * B + b) * E;
      for (int64_t c = 0; c < C; ++c) {
        float* line = out.get() + ((n * C + c) * B + b) * kColumns;
        const int64_t here = std::min(kColumns, E - c * kColumns);
        std::copy(row + c * kColumns, row + c * kColumns + here, line);
        std::fill(line + here, line + kColumns, 0.0f);
      }
    }
  });
  return out;
}

// f, feature [S,B,K], count [S,B], g [T,M,B,E] -> dw [P,F,E], the sum of f of each row [P,F]
static ffi::Error DecodeRows(ffi::ThreadPool pool, Floats f, Ints feature, Ints count, Floats g,
                             ffi::Result<Floats> dw, ffi::Result<Floats> sums, Span pairs,
                             Span ends) {
  const auto shape = f.dimensions();
  const int64_t S = shape[0], B = shape[1], K = shape[2];
  const int64_t T = g.dimensions()[0], M = g.dimensions()[1];
  const int64_t P = dw->dimensions()[0], F = dw->dimensions()[1], E = dw->dimensions()[2];
  const int64_t C = split(E, kColumns);
  // Many rows for each strip brought into L2, yet some blocks for each thread.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t rows = std::clamp(F * C / (8 * threads), std::min<int64_t>(F, 2048), F);
  large_pages(dw->typed_data(), dw->size_bytes());
  const auto grads = strips(pool, g.typed_data(), T * M, B, E);
  for (int64_t s = 0; s < S; ++s) {
    const Transposed lists =
        transpose(pool, f.typed_data() + s * B * K, feature.typed_data() + s * B * K,
                  count.typed_data() + s * B, B, K, F);
    for (int64_t p = 0; p < P; ++p) {
      if (pairs[2 * p] != s) continue;
      each(pool, split(F, rows) * C, [&](int64_t block) {
        const int64_t c = block % C, first = block / C * rows;
        const int64_t here = std::min(kColumns, E - c * kColumns);
        for (int64_t id = first; id < std::min(F, first + rows); ++id) {
          const int64_t n = pairs[2 * p + 1] * M + (M == 1 ? 0 : group(ends, id));
          const float* grad = grads.get() + (n * C + c) * B * kColumns;
          const Entry *entry = lists.entries.data() + lists.start[id],
                      *end = lists.entries.data() + lists.start[id + 1];
          Line even, odd;
          for (; entry + 2 <= end; entry += 2) {
            even.add(entry[0].value, grad + entry[0].token * kColumns);
            odd.add(entry[1].value, grad + entry[1].token * kColumns);
          }
          if (entry < end) even.add(entry->value, grad + entry->token * kColumns);
          for (int i = 0; i < kColumns / kLanes; ++i) even.part[i] += odd.part[i];
          std::memcpy(dw->typed_data() + (p * F + id) * E + c * kColumns, even.part, 4 * here);
          if (c == 0) {
            float sum = 0;
            for (int64_t i = lists.start[id]; i < lists.start[id + 1]; ++i) {
              sum += lists.entries[i].value;
            }
            sums->typed_data()[p * F + id] = sum;
          }
        }
      });
    }
  }
  return ffi::Error::Success();
}

// ---- the k-th largest --------------------------------------------------------------------------

static inline uint32_t ordered(float value) {  // an integer that sorts as the float does
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// z -> its k-th largest value: a histogram of the upper bits, then of the next bits in that bin, ..
static ffi::Error KthLargest(ffi::ThreadPool pool, Floats z, ffi::Result<Floats> kth, int64_t k) {
  constexpr int kWidths[] = {11, 11, 10};  // bits: both tables stay in L1
  constexpr int64_t kBins = 2048;
  const int64_t n = z.element_count();
  const int64_t blocks = std::min<int64_t>({64, std::max<int64_t>(1, pool.num_threads()), n});
  std::vector<std::vector<uint32_t>> counts(blocks);
  uint64_t found = 0;
  int shift = 32;
  for (const int width : kWidths) {
    const int above = shift;
    shift -= width;
    each(pool, blocks, [&](int64_t block) {
      counts[block].assign(2 * kBins, 0);  // two tables: equal neighbours need not wait
      uint32_t* bins = counts[block].data();
      auto add = [&](float value, int64_t table) {
        const uint64_t key = ordered(value);
        if (key >> above == found) ++bins[table + ((key >> shift) & ((1u << width) - 1))];
      };
      const float *from = z.typed_data() + n * block / blocks,
                  *to = z.typed_data() + n * (block + 1) / blocks;
      for (; from + 2 <= to; from += 2) add(from[0], 0), add(from[1], kBins);
      if (from < to) add(*from, 0);
    });
    int64_t bin = (1 << width) - 1;
    for (;; --bin) {
      int64_t here = 0;
      for (const auto& c : counts) here += int64_t(c[bin]) + c[kBins + bin];
      if (here >= k || bin == 0) break;
      k -= here;
    }
    found = found << width | uint64_t(bin);
  }
  const uint32_t key = uint32_t(found), bits = key >> 31 ? key & 0x7fffffffu : ~key;
  std::memcpy(kth->typed_data(), &bits, 4);
  return ffi::Error::Success();
}

// ---- the optimizer -----------------------------------------------------------------------------

static inline Lanes root(Lanes x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Lanes>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

static inline float sum(Lanes x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// A step of Adam on rows w, m, v, g [N,..,D] -> w, m, v, in one pass over memory. scalars [4,N]: the
// rate, 1 / (1 - b1^t), 1 / (1 - b2^t), the factor of the gradients. An m of another size than w: no
// first moments. most: the largest root mean square of a row's change before the rate, 0 for any.
// unit: rows have unit norm, and keep it: gradients along them are left out.
static ffi::Error AdamRows(ffi::ThreadPool pool, Floats w, Floats m, Floats v, Floats g,
                           Floats scalars, ffi::Result<Floats> new_w, ffi::Result<Floats> new_m,
                           ffi::Result<Floats> new_v, float b1, float b2, float epsilon,
                           float most, bool unit) {
  const int64_t D = w.dimensions().back(), rows = w.element_count() / D;
  const bool first = m.element_count() == w.element_count();
  const int64_t N = scalars.dimensions()[1];
  constexpr int64_t kRows = 16;
  each(pool, split(rows, kRows), [&](int64_t block) {
    const int64_t padded = split(D, kLanes) * kLanes;
    std::vector<float> held(3 * padded);  // w, the gradient and then the change, padded with 0
    float *x = held.data(), *u = x + padded, *moment = u + padded;
    for (int64_t row = block * kRows; row < std::min(rows, (block + 1) * kRows); ++row) {
      const int64_t at = row * D;
      const float* own = scalars.typed_data() + row / (rows / N);
      const float rate = own[0], c1 = own[N], c2 = own[2 * N], factor = own[3 * N];
      std::memcpy(x, w.typed_data() + at, D * sizeof(float));
      std::memcpy(u, g.typed_data() + at, D * sizeof(float));
      auto over = [&](auto&& part) {
        for (int64_t d = 0; d < padded; d += kLanes) part(d);
      };
      auto put = [](float* p, Lanes value) { *reinterpret_cast<Lanes*>(p) = value; };
      float along = 0;
      if (unit) {
        Lanes dot = {};
        over([&](int64_t d) { dot += lanes(x + d) * lanes(u + d); });
        along = sum(dot);
      }
      over([&](int64_t d) { put(u + d, factor * (lanes(u + d) - along * lanes(x + d))); });
      std::memcpy(moment, v.typed_data() + at, D * sizeof(float));
      over([&](int64_t d) {
        put(moment + d, b2 * lanes(moment + d) + (1 - b2) * lanes(u + d) * lanes(u + d));
      });
      std::memcpy(new_v->typed_data() + at, moment, D * sizeof(float));
      if (first) {
        float* to = new_m->typed_data() + at;
        const float* from = m.typed_data() + at;
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) {
          put(u + d, b1 * lanes(from + d) + (1 - b1) * lanes(u + d));
        }
        for (; d < D; ++d) u[d] = b1 * from[d] + (1 - b1) * u[d];
        std::memcpy(to, u, D * sizeof(float));
      }
      Lanes squares = {};
      over([&](int64_t d) {
        const Lanes change = c1 * lanes(u + d) / (root(c2 * lanes(moment + d)) + epsilon);
        put(u + d, change);
        squares += change * change;
      });
      float step = rate;
      if (most > 0) step /= std::max(1.0f, std::sqrt(sum(squares) / D) / most);
      Lanes norm = {};
      over([&](int64_t d) {
        const Lanes value = lanes(x + d) - step * lanes(u + d);
        put(x + d, value);
        norm += value * value;
      });
      if (unit) {
        const float scale = 1 / std::max(std::sqrt(sum(norm)), 1e-20f);
        over([&](int64_t d) { put(x + d, scale * lanes(x + d)); });
      }
      std::memcpy(new_w->typed_data() + at, x, D * sizeof(float));
    }
  });
  return ffi::Error::Success();
}

#define POOL ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_scope_compact, Compact,
                              POOL.Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Ret<Floats>().Ret<Ints>().Ret<Ints>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_scope_largest, Largest,
                              POOL.Arg<Floats>().Arg<Floats>()
                                  .Ret<Floats>().Ret<Ints>().Ret<Ints>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_scope_decode, Decode,
                              POOL.Arg<Floats>().Arg<Ints>().Arg<Ints>().Arg<Floats>()
                                  .Ret<Floats>().Attr<Span>("pairs").Attr<Span>("ends"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_scope_decode_values, DecodeValues,
                              POOL.Arg<Ints>().Arg<Ints>().Arg<Floats>().Arg<Floats>()
                                  .Ret<Floats>().Attr<Span>("pairs").Attr<Span>("ends"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_scope_decode_rows, DecodeRows,
                              POOL.Arg<Floats>().Arg<Ints>().Arg<Ints>().Arg<Floats>()
                                  .Ret<Floats>().Ret<Floats>()
                                  .Attr<Span>("pairs").Attr<Span>("ends"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_scope_kth_largest, KthLargest,
                              POOL.Arg<Floats>().Ret<Floats>().Attr<int64_t>("k"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_scope_adam_rows, AdamRows,
                              POOL.Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
                                  .Attr<float>("b1").Attr<float>("b2").Attr<float>("epsilon")
                                  .Attr<float>("most").Attr<bool>("unit"));
