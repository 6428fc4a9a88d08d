// Shared by the ops of this folder: rows of tensors as vectors of float, and how work is split.
//
// The ops are the CPU's launchers: the functions of sfkernels/gpu, by the same names and with the
// same arguments, which each op checks (check.h). Shapes are named as in sfkernels/reference.py.
// Everything is computed in float and rounded once, as it is stored.
//
// Each source is compiled once for every instruction set, into a library of its own;
// sfkernels/cpp.py loads the one for what PyTorch found this processor to have.
#pragma once

#include <ATen/cpu/vec/vec.h>
// Defined behind ATen's header, which refuses it: a library built with a later PyTorch loads in
// every one from 2.11 on.
#define TORCH_TARGET_VERSION ((2ULL << 56) | (11ULL << 48))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace sfkernels {

using Vec = at::vec::Vectorized<float>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<float>;

constexpr int64_t kLanes = Vec::size();
// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// The n ≤ kLanes elements at p, and zeros behind them.
template <typename T>
inline Vec get(const T* p, int64_t n = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(p, n);
#if defined(CPU_CAPABILITY_AVX512)
  } else if (std::is_same_v<T, c10::BFloat16> && n == kLanes) {
    // ATen's would load as many again, behind a mask.
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#endif
  } else {
    return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(p, n));
  }
}

// A vector as it is stored as T, in the first lanes; and as that is read again.
template <typename T>
inline at::vec::Vectorized<T> narrowed(Vec v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    return at::vec::convert<T>(v);
  }
}

template <typename T>
inline Vec widened(at::vec::Vectorized<T> v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    return at::vec::convert<float>(v);
  }
}

template <typename T>
inline void put(T* p, Vec v, int64_t n = kLanes) {
  narrowed<T>(v).store(p, n);
}

// Has the line fetched that lies a page ahead: a processor's own prefetching ends with the page.
template <typename T>
inline void fetch_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 4096), 0, 2);
}

// Bytes from which on an output leaves the caches before anyone reads it.
constexpr int64_t kStreamed = 8 << 20;

// Writes an output, past the caches where it is too large for them: a line that is stored in the
// usual way is first read.
template <typename T>
class Output {
 public:
  Output() = default;
  // elements: that are written. strides: of the rows from the start on.
  Output(T* start, int64_t elements, std::initializer_list<int64_t> strides) : start_(start) {
    streamed_ = elements * static_cast<int64_t>(sizeof(T)) >= kStreamed &&
        reinterpret_cast<uintptr_t>(start) % 64 == 0;
    for (const int64_t stride : strides) {
      streamed_ = streamed_ && stride * sizeof(T) % 64 == 0;
    }
  }
  // Rows of `channels` elements.
  Output(const Tensor& t, int64_t channels)
      : Output(static_cast<T*>(t.data_ptr()), t.numel(), {channels}) {}
  Output(const Optional& t, int64_t channels)
      : Output(t ? Output(*t, channels) : Output()) {}

  // Address of an offset; null if there is no output.
  T* at(int64_t offset) const {
    return start_ ? start_ + offset : nullptr;
  }

  // n elements; a whole vector to a multiple of its length.
  template <typename Count>
  void write(T* p, Vec v, Count n) const {
    write_narrowed(p, narrowed<T>(v), n);
  }

  template <typename Count>
  void write_narrowed(T* p, at::vec::Vectorized<T> v, Count n) const {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    if constexpr (!std::is_same_v<Count, int64_t>) {
      if (streamed_) {
        stream(p, v);
        return;
      }
    }
#endif
    v.store(p, n);
  }

  // Called by each thread behind its last write.
  void done() const {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    if (streamed_) {
      _mm_sfence();
    }
#endif
  }

 private:
  T* start_ = nullptr;
  bool streamed_ = false;

#if defined(CPU_CAPABILITY_AVX512)
  static void stream(T* p, at::vec::Vectorized<T> v) {
    if constexpr (std::is_same_v<T, float>) {
      _mm512_stream_ps(p, v);
    } else {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(v));
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  static void stream(T* p, at::vec::Vectorized<T> v) {
    if constexpr (std::is_same_v<T, float>) {
      _mm256_stream_ps(p, v);
    } else {
      _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(v));
    }
  }
#endif
};

// The sum of all lanes.
inline float across(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(v);
#else
  std::array<float, kLanes> lanes;
  v.store(lanes.data());
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
#endif
}

// e^v to two units in the last place, but for denormals (Cephes); inline, unlike the library's.
inline Vec exp_of(Vec v) {
  // NaN stays: it is the second argument that counts then.
#if defined(CPU_CAPABILITY_AVX512)
  v = _mm512_max_ps(_mm512_set1_ps(-104), v);
#else
  v = at::vec::clamp(v, Vec(-87.3f), Vec(88.3f));
#endif
  const Vec n = (v * Vec(1.44269504f)).round();
  Vec r = at::vec::fnmadd(n, Vec(0.693359375f), v); // ln 2 in two parts
  r = at::vec::fnmadd(n, Vec(-2.12194440e-4f), r);
  Vec p = at::vec::fmadd(r, Vec(1.9875691500e-4f), Vec(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + Vec(1));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  // Its exponent, n more.
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits shift = at::vec::convert_to_int_of_same_size(n) << Bits(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + shift);
#endif
}

// Sums are taken in so many vectors side by side: one addition has to wait for the one before.
constexpr int kChains = 4;

// A sum of vectors. The chains are emptied every 32 additions: what is added to a sum a thousand
// times larger loses bits, the same ones every time where the data has 16 bits (5e-7 of a sum of
// 20,000 squares, 2e-6 of 65,536).
class Sum {
 public:
  template <int k>
  void add(Vec v, std::integral_constant<int, k> chain) {
    chains_[k] = chains_[k] + v;
    count(chain);
  }

  template <int k>
  void add_product(Vec a, Vec b, std::integral_constant<int, k> chain) {
    chains_[k] = at::vec::fmadd(a, b, chains_[k]);
    count(chain);
  }

  float total() const {
    return across(emptied_ + in_chains());
  }

 private:
  Vec in_chains() const {
    return (chains_[0] + chains_[1]) + (chains_[2] + chains_[3]);
  }

  template <int k>
  void count(std::integral_constant<int, k>) {
    if constexpr (k == 0) {
      if (++additions_ % 32 == 0) {
        emptied_ = emptied_ + in_chains();
        chains_.fill(Vec(0));
      }
    }
  }

  std::array<Vec, kChains> chains_{Vec(0), Vec(0), Vec(0), Vec(0)};
  Vec emptied_{0};
  int64_t additions_ = 0;
};

// Calls f(i, n, k) for the elements i to i + n of a row. n is the constant kLanes for all but the
// last vector, which may be cut; k, a constant too, is the chain that sums of this vector go to.
template <typename F>
inline void for_vectors(int64_t count, const F& f) {
  constexpr std::integral_constant<int64_t, kLanes> all;
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    f(i, all, std::integral_constant<int, 0>{});
    f(i + kLanes, all, std::integral_constant<int, 1>{});
    f(i + 2 * kLanes, all, std::integral_constant<int, 2>{});
    f(i + 3 * kLanes, all, std::integral_constant<int, 3>{});
  }
  for (; i + kLanes <= count; i += kLanes) {
    f(i, all, std::integral_constant<int, 0>{});
  }
  if (i < count) {
    f(i, count - i, std::integral_constant<int, 0>{});
  }
}

// The first n lanes, and zeros behind them.
template <typename Count>
inline Vec first(Vec v, Count n) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    return Vec::set(Vec(0), v, n);
  }
  return v;
}

// Mean and sum of squared differences from it of value(i, n), which is called once for each vector:
// those of every lane by groups of vectors, then of all lanes (Chan et al., 1979). again(i, n) gives
// a value once more.
template <typename F, typename G>
inline std::pair<float, float> moments(int64_t count, const F& value, const G& again) {
  constexpr int64_t kGroup = 8;
  Vec mean(0), squares(0);
  int64_t i = 0;
  for (float groups = 1; i + kGroup * kLanes <= count; i += kGroup * kLanes, ++groups) {
    std::array<Vec, kGroup> v;
    for (int64_t j = 0; j < kGroup; ++j) {
      v[j] = value(i + j * kLanes, std::integral_constant<int64_t, kLanes>{});
    }
    const Vec sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    const Vec here = sum * Vec(1.f / kGroup), change = here - mean;
    std::array<Vec, 2> within{Vec(0), Vec(0)};
    for (int64_t j = 0; j < kGroup; ++j) {
      const Vec d = v[j] - here;
      within[j % 2] = at::vec::fmadd(d, d, within[j % 2]);
    }
    mean = at::vec::fmadd(change, Vec(1 / groups), mean);
    squares = squares + (within[0] + within[1]);
    squares = at::vec::fmadd(change * change, Vec(kGroup * (groups - 1) / groups), squares);
  }
  const int64_t whole = i, rest = count - i;
  const float mean_whole = across(mean) / kLanes;
  const Vec apart = mean - Vec(mean_whole);
  const float squares_whole = across(squares) + across(apart * apart) * (whole / kLanes);
  if (rest == 0) {
    return {mean_whole, squares_whole};
  }
  Sum sum, squares_sum;
  for_vectors(rest, [&](int64_t j, auto n, auto k) { sum.add(value(whole + j, n), k); });
  const float mean_rest = sum.total() / rest;
  for_vectors(rest, [&](int64_t j, auto n, auto k) {
    const Vec d = first(again(whole + j, n) - Vec(mean_rest), n);
    squares_sum.add_product(d, d, k);
  });
  const float change = mean_rest - mean_whole, share = static_cast<float>(rest) / count;
  return {
      mean_whole + change * share,
      squares_whole + squares_sum.total() + change * change * share * whole};
}

// f(T{}) for the type of the elements.
template <typename F>
inline auto by_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      return f(c10::Half{});
  }
}

inline int64_t padded(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

template <typename T>
inline T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Rows of [B, L, ...], whose trailing dimensions lie side by side; or none. Of a size 1 that stands
// for all, the stride is 0.
template <typename T>
struct Rows {
  T* start = nullptr;
  int64_t stride_b = 0, stride_l = 0;

  Rows() = default;
  explicit Rows(const Tensor& t)
      : start(data<T>(t)),
        stride_b(t.size(0) == 1 ? 0 : t.stride(0)),
        stride_l(t.size(1) == 1 ? 0 : t.stride(1)) {}
  explicit Rows(const Optional& t) : Rows(t ? Rows(*t) : Rows()) {}

  // None where there are no rows.
  T* at(int64_t b, int64_t l) const {
    return start ? start + (b * stride_b + l * stride_l) : nullptr;
  }
};

inline Tensor empty(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::runtime_error&) { // which names a line of PyTorch's
    std::ostringstream sentence;
    sentence << "there is no memory for an output of shape " << Listed{sizes};
    throw std::runtime_error(sentence.str());
  }
}

inline Tensor empty(const Tensor& like, const Ints& sizes) {
  return empty(like, sizes, like.scalar_type());
}

inline Ints sizes_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

// The elements of a short integer tensor [N] or [B, N].
inline Ints integers(const Tensor& t) {
  const int64_t count = t.size(-1), outer = t.dim() == 2 ? t.stride(0) : 0;
  Ints values(t.numel());
  for (int64_t i = 0; i < t.numel(); ++i) {
    const int64_t at = i / count * outer + i % count * t.stride(-1);
    values[i] = t.scalar_type() == ScalarType::Int ? data<int32_t>(t)[at] : data<int64_t>(t)[at];
  }
  return values;
}

// `channels` elements of a tensor from an offset on, as floats, with `plus` added.
inline void widen(Floats& to, const Tensor& t, int64_t offset, int64_t channels, float plus = 0) {
  by_dtype(t.scalar_type(), [&](auto zero) {
    const auto* from = data<decltype(zero)>(t) + offset;
    for_vectors(channels, [&](int64_t i, auto n, auto) {
      put(to.data() + i, get(from + i, n) + Vec(plus));
    });
  });
}

// A modulation [B or 1, F or 1, C] as floats, for the frame at hand.
struct Modulation {
  const Optional& tensor;
  const int64_t channels;
  const float plus = 0;
  Floats values = Floats(padded(channels));

  void move_to(int64_t b, int64_t f) {
    if (tensor) {
      const int64_t at_b = tensor->size(0) == 1 ? 0 : b * tensor->stride(0);
      const int64_t at_f = tensor->size(1) == 1 ? 0 : f * tensor->stride(1);
      widen(values, *tensor, at_b + at_f, channels, plus);
    }
  }

  Vec at(int64_t i) const {
    return get(values.data() + i);
  }
};

// Calls f(begin, end) for parts of `rows` rows, in parallel.
template <typename F>
inline void parallel_rows(int64_t rows, int64_t row_elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_elements));
  torch::stable::parallel_for(0, rows, grain, f);
}

// Sums over rows are taken in strips of so many rows, and over the strips in double, in the same
// order whatever the number of threads.
constexpr int64_t kStrip = 32;

// The gradient of a tensor of shape [C] or [B or 1, F or 1, C] from sums over strips,
// partial [B, F, S, C].
inline Tensor sum_strips(
    const Floats& partial,
    const Tensor& like,
    int64_t batch,
    int64_t frames,
    int64_t strips,
    int64_t channels) {
  Tensor out = empty(like, sizes_of(like));
  const int64_t of_b = like.dim() == 3 ? like.size(0) : 1;
  const int64_t of_f = like.dim() == 3 ? like.size(1) : 1;
  constexpr int64_t kColumns = 16 * kLanes;
  const int64_t blocks = (channels + kColumns - 1) / kColumns;
  const int64_t rows_each = batch * frames * strips / std::max<int64_t>(1, of_b * of_f);
  by_dtype(like.scalar_type(), [&](auto zero) {
    auto* const to = data<decltype(zero)>(out);
    parallel_rows(of_b * of_f * blocks, rows_each * kColumns, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t target = unit / blocks, column = unit % blocks * kColumns;
        const int64_t b0 = target / of_f, f0 = target % of_f;
        const int64_t b1 = of_b == 1 ? batch : b0 + 1, f1 = of_f == 1 ? frames : f0 + 1;
        const int64_t columns = std::min(kColumns, channels - column);
        std::array<double, kColumns> total{};
        for (int64_t b = b0; b < b1; ++b) {
          for (int64_t f = f0; f < f1; ++f) {
            for (int64_t s = 0; s < strips; ++s) {
              const float* from =
                  partial.data() + ((b * frames + f) * strips + s) * channels + column;
              for (int64_t i = 0; i < columns; ++i) {
                total[i] += from[i];
              }
            }
          }
        }
        std::array<float, kColumns> rounded{};
        std::copy_n(total.begin(), columns, rounded.begin());
        for_vectors(columns, [&](int64_t i, auto n, auto) {
          put(to + target * channels + column + i, get(rounded.data() + i), n);
        });
      }
    });
  });
  return out;
}

} // namespace sfkernels
