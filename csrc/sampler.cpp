// The update of a sampler, noise from a counter, and DMD's gradient.
//
// Seeds, frames' indices and sigmas are read before the work begins.
#include "rows.h"

#include <limits>
#include <numeric>

namespace sfkernels {
namespace {

constexpr int64_t kGroups = 4 * kLanes; // of four normals each, drawn at once
constexpr int64_t kBlock = 4 * kGroups; // elements that a thread takes at a time

// Standard normals of one frame, as sfkernels.normal defines them.
class Normals {
 public:
  Normals(int64_t seed, int64_t frame, int64_t draw)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        frame_(static_cast<uint32_t>(frame)),
        draw_(static_cast<uint32_t>(draw)) {}

  // Elements `start` to `start + kBlock` of the frame; start is a multiple of kBlock.
  void operator()(int64_t start, float* out) const {
    alignas(64) std::array<std::array<float, kGroups>, 4> uniform;
    for (int64_t g = 0; g < kGroups; ++g) {
      uint32_t w0 = static_cast<uint32_t>(start / 4 + g), w1 = frame_, w2 = draw_, w3 = 0;
      uint32_t k0 = key_[0], k1 = key_[1];
      for (int round = 0; round < 10; ++round) { // Philox4x32-10
        const uint64_t p0 = uint64_t{0xD2511F53} * w0, p1 = uint64_t{0xCD9E8D57} * w2;
        w0 = static_cast<uint32_t>(p1 >> 32) ^ w1 ^ k0;
        w2 = static_cast<uint32_t>(p0 >> 32) ^ w3 ^ k1;
        w1 = static_cast<uint32_t>(p1);
        w3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
      }
      const std::array<uint32_t, 4> words{w0, w1, w2, w3};
      for (int i = 0; i < 4; ++i) {
        uniform[i][g] = (static_cast<float>(static_cast<int32_t>(words[i] >> 9)) + 0.5f) * 0x1p-23f;
      }
    }
    for (int64_t g = 0; g < kGroups; g += kLanes) {
      const auto [n0, n1] = box_muller(uniform[0].data() + g, uniform[1].data() + g);
      const auto [n2, n3] = box_muller(uniform[2].data() + g, uniform[3].data() + g);
      const auto [even_low, even_high] = at::vec::interleave2(n0, n2);
      const auto [odd_low, odd_high] = at::vec::interleave2(n1, n3);
      const auto [a, b] = at::vec::interleave2(even_low, odd_low);
      const auto [c, d] = at::vec::interleave2(even_high, odd_high);
      int64_t at = 4 * g;
      for (const Vec& v : {a, b, c, d}) {
        v.store(out + at);
        at += kLanes;
      }
    }
  }

 private:
  std::array<uint32_t, 2> key_;
  uint32_t frame_, draw_;

  // r·cos 2πu and r·sin 2πu. Angles are cut to an eighth of a turn, exactly.
  static std::pair<Vec, Vec> box_muller(const float* radius, const float* turn) {
    const Vec r = (Vec(-2) * Vec::loadu(radius).log()).sqrt();
    const Vec u = Vec::loadu(turn);
    const Vec quarter = (Vec(4) * u + Vec(0.5f)).floor();
    const Vec t = Vec(2) * u - Vec(0.5f) * quarter; // in half turns, −1/4 to 1/4
    const Vec s = t * t;
    // Taylor series, good to 1e-8 on ±π/4.
    Vec cos = at::vec::fmadd(s, Vec(-0.0258068913f), Vec(0.235330630f));
    cos = at::vec::fmadd(cos, s, Vec(-1.33526277f));
    cos = at::vec::fmadd(cos, s, Vec(4.05871213f));
    cos = at::vec::fmadd(cos, s, Vec(-4.93480220f));
    cos = at::vec::fmadd(cos, s, Vec(1));
    Vec sin = at::vec::fmadd(s, Vec(0.0821458866f), Vec(-0.599264529f));
    sin = at::vec::fmadd(sin, s, Vec(2.55016404f));
    sin = at::vec::fmadd(sin, s, Vec(-5.16771278f));
    sin = at::vec::fmadd(sin, s, Vec(3.14159265f)) * t;
    // Quarters 1 and 3 swap sine and cosine; 1 and 2 turn the cosine, 2 and 3 the sine.
    const Vec odd = (quarter == Vec(1)) | (quarter == Vec(3));
    const Vec x = Vec::blendv(cos, sin, odd), y = Vec::blendv(sin, cos, odd);
    const Vec x_turns = (quarter == Vec(1)) | (quarter == Vec(2));
    const Vec y_turns = (quarter == Vec(2)) | (quarter == Vec(3));
    return {r * Vec::blendv(x, x.neg(), x_turns), r * Vec::blendv(y, y.neg(), y_turns)};
  }
};

// Raises unless x has at least two dimensions, and the others its shape.
void check_all(
    const Tensor& x, std::initializer_list<std::pair<const char*, Optional>> others) {
  check_dtype("x", x, kFloats);
  require(x.dim() >= 2, "x has shape ", Listed{x.sizes()}, ": must have two dimensions or more");
  for (const auto& [name, t] : others) {
    if (t) {
      check_dtype(name, *t, kFloats);
      require(
          sizes_of(*t) == sizes_of(x), name, " has shape ", Listed{t->sizes()}, ": must be ",
          Listed{x.sizes()});
    }
  }
}

void check_sigma(const char* name, const Tensor& sigma, const Tensor& x) {
  check_dtype(name, sigma, kSigmas);
  const auto sizes = sigma.sizes();
  bool fits = sizes.size() <= 2;
  for (size_t d = 0; fits && d < sizes.size(); ++d) {
    fits = sizes[d] == x.size(d);
  }
  require(fits, name, " has shape ", Listed{sizes}, ": must be [], [", x.size(0), "] or [",
          x.size(0), ", ", x.size(1), "]");
}

void check_noise(
    const Tensor& seed_B, const Tensor& frame_F, int64_t draw, int64_t batch, int64_t frames) {
  check("seed", seed_B, {batch}, {ScalarType::Long}, 0);
  check("frame", frame_F, {frames}, kIntegers, 0);
  require(0 <= draw && draw < kTooMany, "draw=", draw, ": must be in 0..2^31 - 1");
}

// The elements of a frame of a shape [B, F, ...]: the counter of the noise has 32 bits for groups of
// four.
int64_t elements_of_frame(const Ints& shape) {
  int64_t count = 1;
  for (size_t d = 2; d < shape.size(); ++d) {
    require(shape[d] < kTooMany && count * shape[d] < kTooMany, "shape is ", Listed{shape},
            ": a frame must have fewer than ", kTooMany, " elements");
    count *= shape[d];
  }
  return count;
}

// Frames of [B, F, ...], or samples of [B, ...], whose elements lie side by side and are of type T:
// in the tensor or in a copy of it; or none.
template <typename T>
class Frames {
 public:
  Frames(const Optional& t, int64_t outer) {
    if (!t) {
      return;
    }
    held_ = *t;
    int64_t expected = 1;
    for (int64_t d = t->dim() - 1; d >= outer; --d) {
      if (t->size(d) != 1 && t->stride(d) != expected) {
        held_ = torch::stable::contiguous(*t);
        break;
      }
      expected *= t->size(d);
    }
    if (t->scalar_type() != dtype()) {
      held_ = torch::stable::to(*held_, dtype());
    }
    start_ = data<T>(*held_);
    stride_b_ = held_->stride(0);
    stride_f_ = outer > 1 ? held_->stride(1) : 0;
  }

  // Address of an element of a frame; f is 0 of samples. Null if there are none.
  const T* at(int64_t b, int64_t f, int64_t element) const {
    return start_ ? start_ + (b * stride_b_ + f * stride_f_ + element) : nullptr;
  }

 private:
  Optional held_;
  const T* start_ = nullptr;
  int64_t stride_b_ = 0, stride_f_ = 0;

  static constexpr ScalarType dtype() {
    return std::is_same_v<T, float> ? ScalarType::Float
        : std::is_same_v<T, c10::BFloat16> ? ScalarType::BFloat16
                                           : ScalarType::Half;
  }
};

// f(out, in) with a value of x's type and one of the type that all tensors are read in: theirs, or
// float where they differ.
template <typename F>
void by_dtypes(const Tensor& x, std::initializer_list<Optional> others, const F& f) {
  const bool same = std::all_of(others.begin(), others.end(), [&](const auto& t) {
    return !t || t->scalar_type() == x.scalar_type();
  });
  by_dtype(x.scalar_type(), [&](auto out) {
    if (same) {
      f(out, out);
    } else {
      f(out, float{});
    }
  });
}

// A sigma of shape [], [B] or [B, F], as floats [B, F].
Floats by_frame(const Optional& sigma, int64_t batch, int64_t frames) {
  Floats values;
  if (!sigma) {
    return values;
  }
  const Tensor as_float = torch::stable::to(*sigma, ScalarType::Float);
  const int64_t stride_b = as_float.dim() > 0 ? as_float.stride(0) : 0;
  const int64_t stride_f = as_float.dim() > 1 ? as_float.stride(1) : 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t f = 0; f < frames; ++f) {
      values.push_back(data<float>(as_float)[b * stride_b + f * stride_f]);
    }
  }
  return values;
}

// Calls f(frame, first element, number of elements) for the blocks of all frames, in parallel.
template <typename F>
void parallel_blocks(int64_t frames, int64_t elements, const F& f) {
  const int64_t blocks = (elements + kBlock - 1) / kBlock;
  parallel_rows(frames * blocks, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % blocks * kBlock;
      f(i / blocks, start, std::min(kBlock, elements - start));
    }
  });
}

std::tuple<Optional, Optional> sampler_step(
    const Tensor& x,
    const Tensor& flow,
    const Optional& uncond_flow,
    const Tensor& sigma,
    const Optional& next_sigma,
    const Optional& noise,
    const Optional& seed_B,
    const Optional& frame_F,
    int64_t draw,
    double guidance,
    bool euler) {
  check_all(x, {{"flow", flow}, {"uncond_flow", uncond_flow}, {"noise", noise}});
  const int64_t batch = x.size(0), frames = x.size(1);
  check_sigma("sigma", sigma, x);
  if (next_sigma) {
    check_sigma("next_sigma", *next_sigma, x);
  }
  require(seed_B.has_value() == frame_F.has_value(), "seed and frame belong together");
  if (seed_B) {
    check_noise(*seed_B, *frame_F, draw, batch, frames);
  }
  require(
      euler ? next_sigma && !noise && !seed_B
            : next_sigma.has_value() == (noise || seed_B) && !(noise && seed_B),
      "next_sigma and one noise, given or drawn, belong together; an Euler step has no noise");
  check_finite("guidance", guidance);
  Optional x0, following;
  if (!euler) {
    x0 = empty(x, sizes_of(x));
  }
  if (next_sigma) {
    following = empty(x, sizes_of(x));
  }
  if (x.numel() == 0) {
    return {x0, following};
  }
  const int64_t elements = elements_of_frame(sizes_of(x));
  const Floats sigmas = by_frame(sigma, batch, frames);
  const Floats next_sigmas = by_frame(next_sigma, batch, frames);
  const Ints seeds = seed_B ? integers(*seed_B) : Ints{};
  const Ints indices = frame_F ? integers(*frame_F) : Ints{};
  const Vec scale(static_cast<float>(guidance));

  by_dtypes(x, {flow, uncond_flow, noise}, [&](auto out, auto in) {
    using T = decltype(out);
    const Frames<decltype(in)> of_x(x, 2), of_flow(flow, 2), of_uncond(uncond_flow, 2);
    const Frames<decltype(in)> of_noise(noise, 2);
    T* const x0_start = x0 ? data<T>(*x0) : nullptr;
    T* const next_start = following ? data<T>(*following) : nullptr;
    parallel_blocks(batch * frames, elements, [&](int64_t frame, int64_t start, int64_t count) {
      const int64_t b = frame / frames, f = frame % frames, offset = frame * elements + start;
      const auto *const given = of_x.at(b, f, start), *const flows = of_flow.at(b, f, start);
      const auto* const unconds = of_uncond.at(b, f, start);
      const auto* const noises = of_noise.at(b, f, start);
      T* const clean_to = x0_start ? x0_start + offset : nullptr;
      T* const next_to = next_start ? next_start + offset : nullptr;
      const Vec s(sigmas[frame]), next(following ? next_sigmas[frame] : 0);
      std::array<float, kBlock> drawn;
      if (seed_B) {
        Normals(seeds[b], indices[f], draw)(start, drawn.data());
      }
      for_vectors(count, [&](int64_t i, auto n, auto) {
        Vec v = get(flows + i, n);
        if (uncond_flow) {
          const Vec u = get(unconds + i, n);
          v = at::vec::fmadd(scale, v - u, u);
        }
        const Vec from = get(given + i, n);
        if (euler) {
          put(next_to + i, at::vec::fmadd(next - s, v, from), n);
          return;
        }
        const Vec clean = at::vec::fnmadd(s, v, from);
        put(clean_to + i, clean, n);
        if (following) {
          const Vec e = seed_B ? get(drawn.data() + i) : get(noises + i, n);
          put(next_to + i, at::vec::fmadd(next, e, (Vec(1) - next) * clean), n);
        }
      });
    });
  });
  return {x0, following};
}

Tensor normal(const Tensor& seed_B, const Tensor& frame_F, int64_t draw, const Ints& shape) {
  require(shape.size() >= 2, "shape is ", Listed{shape}, ": must be [B, F, ...]");
  for (const int64_t size : shape) {
    require(size >= 0, "shape has ", size, ": its sizes must be 0 or more");
  }
  check_noise(seed_B, frame_F, draw, shape[0], shape[1]);
  const int64_t elements = elements_of_frame(shape);
  const Tensor out = empty(seed_B, shape, ScalarType::Float);
  if (out.numel() == 0) {
    return out;
  }
  const int64_t frames = shape[1];
  const Ints seeds = integers(seed_B), indices = integers(frame_F);
  float* const to = data<float>(out);
  parallel_blocks(shape[0] * frames, elements, [&](int64_t frame, int64_t start, int64_t count) {
    std::array<float, kBlock> drawn;
    Normals(seeds[frame / frames], indices[frame % frames], draw)(start, drawn.data());
    std::copy_n(drawn.data(), count, to + frame * elements + start);
  });
  return out;
}

Tensor dmd_gradient(const Tensor& x, const Tensor& real_x0, const Tensor& fake_x0) {
  check_all(x, {{"real_x0", real_x0}, {"fake_x0", fake_x0}});
  const Tensor out = empty(x, sizes_of(x));
  if (x.numel() == 0) {
    return out;
  }
  const int64_t batch = x.size(0), elements = x.numel() / batch;
  const int64_t blocks = (elements + kBlock - 1) / kBlock;
  Floats partial(batch * blocks);
  by_dtypes(x, {real_x0, fake_x0}, [&](auto of_out, auto in) {
    using T = decltype(of_out);
    const Frames<decltype(in)> of_x(x, 1), of_real(real_x0, 1), of_fake(fake_x0, 1);
    T* const out_start = data<T>(out);
    parallel_blocks(batch, elements, [&](int64_t b, int64_t start, int64_t count) {
      const auto *const given = of_x.at(b, 0, start), *const real = of_real.at(b, 0, start);
      Sum distance;
      for_vectors(count, [&](int64_t i, auto n, auto k) {
        distance.add(first((get(given + i, n) - get(real + i, n)).abs(), n), k);
      });
      partial[b * blocks + start / kBlock] = distance.total();
    });
    Floats mean(batch);
    for (int64_t b = 0; b < batch; ++b) {
      const double total = std::accumulate(
          partial.begin() + b * blocks, partial.begin() + (b + 1) * blocks, 0.0);
      mean[b] = static_cast<float>(total / static_cast<double>(elements));
    }
    const Vec largest(static_cast<float>(std::numeric_limits<T>::max()));
    parallel_blocks(batch, elements, [&](int64_t b, int64_t start, int64_t count) {
      const auto *const real = of_real.at(b, 0, start), *const fake = of_fake.at(b, 0, start);
      T* const to = out_start + b * elements + start;
      for_vectors(count, [&](int64_t i, auto n, auto) {
        const Vec g = (get(fake + i, n) - get(real + i, n)) / Vec(mean[b]);
        // Like torch.nan_to_num: NaN becomes 0 (it is not itself), an infinity the largest number.
        const Vec finite = at::vec::minimum(at::vec::maximum(g, largest.neg()), largest);
        put(to + i, Vec::blendv(finite, Vec(0), g != g), n);
      });
    });
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sfkernels_cpp, m) {
  m.def(
      "sampler_step(Tensor x, Tensor flow, Tensor? uncond_flow, Tensor sigma, Tensor? next_sigma, "
      "Tensor? noise, Tensor? seed, Tensor? frame, int draw, float guidance, bool euler) "
      "-> (Tensor?, Tensor?)");
  m.def("normal(Tensor seed, Tensor frame, int draw, int[] shape) -> Tensor");
  m.def("dmd_gradient(Tensor x, Tensor real_x0, Tensor fake_x0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sfkernels_cpp, CPU, m) {
  m.impl("sampler_step", TORCH_BOX(&sampler_step));
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("dmd_gradient", TORCH_BOX(&dmd_gradient));
}

} // namespace sfkernels
