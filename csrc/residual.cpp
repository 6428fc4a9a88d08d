// The gated residual where no norm follows, and its backward.
#include "rows.h"

namespace sfkernels {
namespace {

// Raises unless these are rows [B, L, C] and a gate [B or 1, F or 1, C] of frames that divide L.
void check_rows(const Tensor& x, const Tensor& y, const Tensor& gate) {
  check("x", x, {kAny, kAny, kAny}, kFloats);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  check("y", y, {batch, tokens, channels}, {x.scalar_type()});
  check("gate", gate, {kAny, kAny, channels}, kFloats);
  const int64_t frames = gate.size(1);
  require(
      (gate.size(0) == 1 || gate.size(0) == batch) && frames > 0 && tokens % frames == 0,
      "gate has shape ", Listed{gate.sizes()}, ": must be [1 or ", batch, ", frames, ", channels,
      "] with frames a divisor of the ", tokens, " tokens");
}

Tensor gated_residual_fwd(const Tensor& x_BLC, const Tensor& y_BLC, const Tensor& gate_BFC) {
  check_rows(x_BLC, y_BLC, gate_BFC);
  const int64_t batch = x_BLC.size(0), tokens = x_BLC.size(1), channels = x_BLC.size(2);
  const int64_t per_frame = tokens / gate_BFC.size(1);
  Tensor out_BLC = empty(x_BLC, sizes_of(x_BLC));
  const Optional gate_of_all = gate_BFC;
  by_dtype(x_BLC.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> x_rows(x_BLC), y_rows(y_BLC);
    const Output<T> out(out_BLC, channels);
    parallel_rows(batch * tokens, channels, [&](int64_t begin, int64_t end) {
      Modulation gate{gate_of_all, channels};
      for (int64_t token = begin; token < end; ++token) {
        const int64_t b = token / tokens, l = token % tokens;
        if (token == begin || l % per_frame == 0) {
          gate.move_to(b, l / per_frame);
        }
        const T *const x = x_rows.at(b, l), *const y = y_rows.at(b, l);
        T* const to = out.at(token * channels);
        for_vectors(channels, [&](int64_t i, auto n, auto) {
          fetch_ahead(x + i);
          fetch_ahead(y + i);
          out.write(to + i, at::vec::fmadd(get(y + i, n), gate.at(i), get(x + i, n)), n);
        });
      }
      out.done();
    });
  });
  return out_BLC;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(
    const Tensor& dout_BLC, const Tensor& y_BLC, const Tensor& gate_BFC) {
  check_rows(dout_BLC, y_BLC, gate_BFC);
  const int64_t batch = y_BLC.size(0), tokens = y_BLC.size(1), channels = y_BLC.size(2);
  const int64_t frames = gate_BFC.size(1), per_frame = tokens / frames;
  const int64_t strips = (per_frame + kStrip - 1) / kStrip, units = batch * frames * strips;
  Tensor dy_BLC = empty(y_BLC, sizes_of(y_BLC));
  Floats dgate(units * channels);
  const Optional gate_of_all = gate_BFC;
  by_dtype(y_BLC.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> dout_rows(dout_BLC), y_rows(y_BLC);
    const Output<T> out(dy_BLC, channels);
    parallel_rows(units, kStrip * channels, [&](int64_t begin, int64_t end) {
      Modulation gate{gate_of_all, channels};
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / strips / frames, f = unit / strips % frames;
        const int64_t first = unit % strips * kStrip;
        float* const sums = dgate.data() + unit * channels;
        gate.move_to(b, f);
        for (int64_t i = first; i < std::min(per_frame, first + kStrip); ++i) {
          const int64_t l = f * per_frame + i;
          const T *const dout = dout_rows.at(b, l), *const y = y_rows.at(b, l);
          T* const dy = out.at((b * tokens + l) * channels);
          for_vectors(channels, [&](int64_t c, auto n, auto) {
            fetch_ahead(dout + c);
            fetch_ahead(y + c);
            const Vec d = get(dout + c, n);
            put(sums + c, at::vec::fmadd(d, get(y + c, n), get(sums + c, n)), n);
            out.write(dy + c, d * gate.at(c), n);
          });
        }
      }
      out.done();
    });
  });
  return {dy_BLC, sum_strips(dgate, gate_BFC, batch, frames, strips, channels)};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sfkernels_cpp, m) {
  m.def("gated_residual_fwd(Tensor x, Tensor y, Tensor gate) -> Tensor");
  m.def("gated_residual_bwd(Tensor dout, Tensor y, Tensor gate) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sfkernels_cpp, CPU, m) {
  m.impl("gated_residual_fwd", TORCH_BOX(&gated_residual_fwd));
  m.impl("gated_residual_bwd", TORCH_BOX(&gated_residual_bwd));
}

} // namespace sfkernels
