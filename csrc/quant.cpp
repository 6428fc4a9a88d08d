// Rows in 8 bits, each with a scale of its own.
//
// Memory is read once: a row whose largest element is known lies in L1.
#include "rows.h"

namespace sfkernels {
namespace {

constexpr int64_t kBlock = 16 * kLanes; // elements that are scaled before they are rounded

inline int32_t bits_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}

struct Int8 {
  static constexpr float largest = 127;

  // The nearest integer for |v| ≤ 127: behind 1.5·2²³ a float has no bits for a fraction, and its
  // last eight are those of the integer.
  static uint8_t round(float v) {
    return static_cast<uint8_t>(bits_of(v + 0x1.8p23f));
  }
};

struct E4m3 {
  static constexpr float largest = 448;

  // The nearest e4m3 for |v| ≤ 448, without branches: the compiler makes vectors of it.
  static uint8_t round(float v) {
    const int32_t bits = bits_of(v), size = bits & 0x7FFFFFFF;
    // Three bits of the mantissa stay; the exponent's bias is 7 instead of 127.
    const int32_t normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3);
    // Below 2⁻⁶, multiples of 2⁻⁹, which is the last bit of 2¹⁴.
    const int32_t small = bits_of(std::abs(v) + 0x1p14f) - bits_of(0x1p14f);
    const int32_t is_small = -static_cast<int32_t>(size < bits_of(0x1p-6f));
    return static_cast<uint8_t>(
        (small & is_small) | (normal & ~is_small) | ((bits >> 24) & 0x80));
  }
};

// NaN where there is one.
template <typename T>
float largest_of(const T* x, int64_t channels) {
  std::array<Vec, kChains> largest{Vec(0), Vec(0), Vec(0), Vec(0)};
  for_vectors(channels, [&](int64_t i, auto n, auto k) {
    fetch_ahead(x + i);
    largest[k] = at::vec::maximum(largest[k], get(x + i, n).abs());
  });
  const Vec both = at::vec::maximum(largest[0], largest[1]);
  std::array<float, kLanes> lanes;
  at::vec::maximum(both, at::vec::maximum(largest[2], largest[3])).store(lanes.data());
  float most = 0;
  for (const float lane : lanes) {
    most = std::isnan(most) || lane <= most ? most : lane;
  }
  return most;
}

template <typename Form, typename T>
void scale_and_round(const T* x, float inverse, uint8_t* q, int64_t channels) {
  const Vec factor(inverse), upper(Form::largest), lower(-Form::largest);
  for (int64_t start = 0; start < channels; start += kBlock) {
    const int64_t count = std::min(kBlock, channels - start);
    std::array<float, kBlock> scaled;
    for_vectors(count, [&](int64_t i, auto n, auto) {
      // The bounds also keep product and rounding apart, which must not be one operation.
      put(scaled.data() + i, at::vec::clamp(get(x + start + i, n) * factor, lower, upper));
    });
    for (int64_t i = 0; i < count; ++i) {
      q[start + i] = Form::round(scaled[i]);
    }
  }
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_BLC, ScalarType dtype) {
  check("x", x_BLC, {kAny, kAny, kAny}, kFloats);
  require(
      x_BLC.size(2) > 0, "x has shape ", Listed{x_BLC.sizes()}, ": its rows must have an element");
  require(
      dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn, "dtype is ", dtype,
      ": must be Char (int8) or Float8_e4m3fn");
  const int64_t batch = x_BLC.size(0), tokens = x_BLC.size(1), channels = x_BLC.size(2);
  const Tensor q_BLC = empty(x_BLC, {batch, tokens, channels}, dtype);
  const Tensor scale_BL = empty(x_BLC, {batch, tokens}, ScalarType::Float);
  const auto run = [&](auto form, auto zero) {
    using Form = decltype(form);
    const Rows<decltype(zero)> rows(x_BLC);
    parallel_rows(batch * tokens, channels, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto* const x = rows.at(row / tokens, row % tokens);
        const float amax = largest_of(x, channels), inverse = Form::largest / amax;
        scale_and_round<Form>(
            x,
            std::isfinite(inverse) ? inverse : 0,
            data<uint8_t>(q_BLC) + row * channels,
            channels);
        data<float>(scale_BL)[row] = amax / Form::largest;
      }
    });
  };
  by_dtype(x_BLC.scalar_type(), [&](auto zero) {
    if (dtype == ScalarType::Char) {
      run(Int8{}, zero);
    } else {
      run(E4m3{}, zero);
    }
  });
  return {q_BLC, scale_BL};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sfkernels_cpp, m) {
  m.def("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sfkernels_cpp, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
}

} // namespace sfkernels
