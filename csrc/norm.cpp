// The norms of a DiT block and of a VAE: [residual,] norm, modulation [, SiLU], and their backward.
//
// Memory is read once and written once, both all the time: the statistics of a row are taken while
// the row before is written.
#include "rows.h"

namespace sfkernels {
namespace {

// The forms of the norm that sfkernels has. centred: LayerNorm, which has a shift; else RMSNorm,
// which has none. gated: the residual is added by a gate.
template <bool Centred, bool Residual, bool Gated, bool Silu>
struct Form {
  static constexpr bool centred = Centred, residual = Residual, gated = Gated, silu = Silu;
};

template <typename F>
void by_form(bool centred, bool residual, bool gated, bool silu, const F& f) {
  if (silu && residual) {
    f(Form<false, true, false, true>{});
  } else if (silu) {
    f(Form<false, false, false, true>{});
  } else if (!centred) {
    f(Form<false, false, false, false>{});
  } else if (gated) {
    f(Form<true, true, true, false>{});
  } else if (residual) {
    f(Form<true, true, false, false>{});
  } else {
    f(Form<true, false, false, false>{});
  }
}

// The frames that x [B, L, C] has by its modulations, which are checked with it and the form.
int64_t frames_of(
    const Tensor& x,
    bool residual,
    const Optional& gate,
    const Optional& scale,
    const Optional& shift,
    bool centred,
    bool silu) {
  check("x", x, {kAny, kAny, kAny}, kFloats);
  require(
      scale.has_value() && centred == shift.has_value() && (residual || !gate) &&
          (centred ? !silu : !gate && (silu || !residual)),
      "no norm of sfkernels has this form: a LayerNorm has scale and shift, perhaps a residual and "
      "its gate, and no SiLU; an RMSNorm has a scale, and with SiLU perhaps a residual");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  require(channels > 0, "x has shape ", Listed{x.sizes()}, ": its rows must have an element");
  const std::array<std::pair<const char*, const Optional&>, 3> modulations{
      {{"gate", gate}, {"scale", scale}, {"shift", shift}}};
  int64_t frames = 1;
  for (const auto& [name, m] : modulations) {
    check(name, m, {kAny, kAny, channels}, kFloats);
    frames = std::max(frames, m ? m->size(1) : 1);
  }
  for (const auto& [name, m] : modulations) {
    if (!m) {
      continue;
    }
    require(
        (m->size(0) == 1 || m->size(0) == batch) && (m->size(1) == 1 || m->size(1) == frames) &&
            tokens % frames == 0,
        name, " has shape ", Listed{m->sizes()}, ": must be [1 or ", batch, ", frames, ", channels,
        "] with frames 1 or the same for all, a divisor of the ", tokens, " tokens");
  }
  return frames;
}

Vec sigmoid(Vec v) {
  return Vec(1) / (Vec(1) + exp_of(v.neg()));
}

std::tuple<Optional, Tensor, Tensor> norm_fwd(
    const Tensor& x_BLC,
    const Optional& y_BLC,
    const Optional& gate_BFC,
    const Optional& scale_BFC,
    const Optional& shift_BFC,
    double eps,
    bool centred,
    bool plus_one,
    bool silu,
    const Optional& bias_C,
    const Optional& before_BPC) {
  const bool has_residual = y_BLC.has_value();
  const int64_t frames =
      frames_of(x_BLC, has_residual, gate_BFC, scale_BFC, shift_BFC, centred, silu);
  const int64_t batch = x_BLC.size(0), tokens = x_BLC.size(1), channels = x_BLC.size(2);
  const Dtypes like_x{x_BLC.scalar_type()};
  check("y", y_BLC, {batch, tokens, channels}, like_x);
  check("before", before_BPC, {batch, kAny, channels}, like_x);
  check("bias", bias_C, {channels}, kFloats);
  require(silu || !bias_C, "bias is given without SiLU: no norm of sfkernels has this form");
  check_positive("eps", eps);
  const int64_t per_frame = tokens / frames;
  const int64_t ahead = before_BPC ? before_BPC->size(1) : 0, rows = ahead + tokens;
  Optional residual_BLC;
  if (y_BLC) {
    residual_BLC = empty(x_BLC, {batch, tokens, channels});
  }
  Tensor out_BLC = empty(x_BLC, {batch, rows, channels});
  Tensor stats_BL2 = empty(x_BLC, {batch, tokens, 2}, ScalarType::Float);
  float* const stats = data<float>(stats_BL2);
  Floats bias(padded(channels));
  if (bias_C) {
    widen(bias, *bias_C, 0, channels);
  }

  by_dtype(x_BLC.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> x_rows(x_BLC), y_rows(y_BLC), before_rows(before_BPC);
    const Output<T> out(out_BLC, channels), residual(residual_BLC, channels);
    parallel_rows(batch * ahead, channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / ahead, l = i % ahead;
        std::copy_n(before_rows.at(b, l), channels, out.at((b * rows + l) * channels));
      }
    });
    const auto run = [&](auto form, int64_t begin, int64_t end) {
      Modulation gate{gate_BFC, channels}, scale{scale_BFC, channels, plus_one ? 1.f : 0.f};
      Modulation shift{shift_BFC, channels};
      Floats read(padded(channels)), written(padded(channels)); // as floats
      float mean = 0, rstd = 0;
      T* to = nullptr;
      const auto emit = [&](int64_t i, auto n) {
        Vec v = get(written.data() + i);
        if constexpr (form.centred) {
          v = at::vec::fmadd((v - Vec(mean)) * Vec(rstd), scale.at(i), shift.at(i));
        } else {
          v = v * Vec(rstd) * scale.at(i);
        }
        out.write(to + i, form.silu ? v * sigmoid(v) : v, n);
      };
      for (int64_t token = begin; token < end; ++token) {
        const int64_t b = token / tokens, l = token % tokens, f = l / per_frame;
        const bool starts = token == begin || l % per_frame == 0;
        if (starts) {
          gate.move_to(b, f);
        }
        const T *const x = x_rows.at(b, l), *const y = y_rows.at(b, l);
        T* const x_new = residual.at(token * channels);
        const auto absorb = [&](int64_t i, auto n) {
          if (token > begin) {
            emit(i, n);
          }
          fetch_ahead(x + i);
          Vec v = get(x + i, n);
          if constexpr (form.silu) {
            v = v + get(bias.data() + i);
          }
          if constexpr (form.residual) {
            fetch_ahead(y + i);
            const Vec added = get(y + i, n);
            v = form.gated ? at::vec::fmadd(added, gate.at(i), v) : v + added;
            const auto stored = narrowed<T>(v);
            residual.write_narrowed(x_new + i, stored, n);
            // The norm is that of the residual stream as stored, as it is in the backward pass.
            v = widened<T>(stored);
          }
          put(read.data() + i, v);
          return v;
        };
        float squares = 0, centre = 0;
        if constexpr (form.centred) {
          std::tie(centre, squares) = moments(
              channels, absorb, [&](int64_t i, auto) { return get(read.data() + i); });
        } else {
          Sum sum;
          for_vectors(channels, [&](int64_t i, auto n, auto k) {
            const Vec v = first(absorb(i, n), n);
            sum.add_product(v, v, k);
          });
          squares = sum.total();
        }
        mean = centre;
        rstd = 1 / std::sqrt(squares / channels + static_cast<float>(eps));
        stats[2 * token] = mean;
        stats[2 * token + 1] = rstd;
        std::swap(read, written);
        to = out.at((b * rows + ahead + l) * channels);
        if (starts) {
          scale.move_to(b, f);
          shift.move_to(b, f);
        }
      }
      for_vectors(channels, [&](int64_t i, auto n, auto) { emit(i, n); });
      out.done();
      residual.done();
    };
    const auto each = [&](auto form) {
      parallel_rows(batch * tokens, channels, [&](int64_t begin, int64_t end) {
        run(form, begin, end);
      });
    };
    by_form(centred, has_residual, gate_BFC.has_value(), silu, each);
  });
  return {residual_BLC, out_BLC, stats_BL2};
}

std::tuple<Tensor, Optional, Optional, Tensor, Optional> norm_bwd(
    const Optional& dresidual_BLC,
    const Tensor& dout_BLC,
    const Tensor& x_BLC,
    const Optional& y_BLC,
    const Optional& gate_BFC,
    const Optional& scale_BFC,
    const Optional& shift_BFC,
    const Tensor& stats_BL2,
    bool centred,
    bool plus_one,
    bool silu) {
  const bool has_residual = dresidual_BLC.has_value();
  const int64_t frames =
      frames_of(x_BLC, has_residual, gate_BFC, scale_BFC, shift_BFC, centred, silu);
  const int64_t batch = x_BLC.size(0), tokens = x_BLC.size(1), channels = x_BLC.size(2);
  const Dtypes like_x{x_BLC.scalar_type()};
  check("dresidual", dresidual_BLC, {batch, tokens, channels}, like_x);
  check("dout", dout_BLC, {batch, tokens, channels}, kFloats);
  check("stats", stats_BL2, {batch, tokens, 2}, {ScalarType::Float}, 3);
  require(y_BLC.has_value() || !gate_BFC, "gate is given without y, which its gradient needs");
  check("y", y_BLC, {batch, tokens, channels}, like_x);
  const int64_t per_frame = tokens / frames, strips = (per_frame + kStrip - 1) / kStrip;
  const int64_t units = batch * frames * strips;
  Tensor dx_BLC = empty(x_BLC, {batch, tokens, channels});
  Optional dy_BLC, dgate_BFC, dshift_BFC;
  if (gate_BFC) {
    dy_BLC = empty(x_BLC, {batch, tokens, channels});
  }
  const float* const stats = data<float>(stats_BL2);
  Floats dscale(units * channels), dshift(shift_BFC ? units * channels : 0);
  Floats dgate(gate_BFC ? units * channels : 0);
  // Another dtype than x's only where x is the wider sum of a 16-bit tensor and a bias.
  const Tensor dout = dout_BLC.scalar_type() == x_BLC.scalar_type()
      ? dout_BLC
      : torch::stable::contiguous(torch::stable::to(dout_BLC, x_BLC.scalar_type()));

  by_dtype(x_BLC.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> dresidual_rows(dresidual_BLC), dout_rows(dout), x_rows(x_BLC);
    const Rows<T> y_rows(gate_BFC ? y_BLC : std::nullopt);
    const Output<T> dx_out(dx_BLC, channels), dy_out(dy_BLC, channels);
    const auto run = [&](auto form, int64_t begin, int64_t end) {
      Modulation gate{gate_BFC, channels}, scale{scale_BFC, channels, plus_one ? 1.f : 0.f};
      // The gradient of a normalised row, where it costs more to take it again.
      Floats read(padded(channels)), written(padded(channels));
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / strips / frames, f = unit / strips % frames;
        if (unit == begin || unit % strips == 0) {
          gate.move_to(b, f);
          scale.move_to(b, f);
        }
        float* const dscale_sum = dscale.data() + unit * channels;
        float* const dshift_sum = form.centred ? dshift.data() + unit * channels : nullptr;
        float* const dgate_sum = form.gated ? dgate.data() + unit * channels : nullptr;
        // Statistics of the row that is written.
        float mean = 0, rstd = 0, slope = 0, offset = 0;
        const T *x = nullptr, *d_out = nullptr, *dresidual = nullptr, *y = nullptr;
        T *dx = nullptr, *dy = nullptr;
        const auto emit = [&](int64_t i, auto n) {
          const Vec v = (get(x + i, n) - Vec(mean)) * Vec(rstd);
          Vec d(0);
          if constexpr (form.silu) {
            d = get(written.data() + i);
          } else {
            d = get(d_out + i, n) * scale.at(i);
          }
          if constexpr (form.centred) {
            d = d - Vec(offset);
          }
          d = at::vec::fnmadd(v, Vec(slope), d) * Vec(rstd);
          if constexpr (form.residual) {
            fetch_ahead(dresidual + i);
            d = d + get(dresidual + i, n);
          }
          if constexpr (form.gated) {
            fetch_ahead(y + i);
            put(dgate_sum + i, at::vec::fmadd(d, get(y + i, n), get(dgate_sum + i, n)), n);
            dy_out.write(dy + i, d * gate.at(i), n);
          }
          dx_out.write(dx + i, d, n);
        };
        const int64_t l0 = f * per_frame + unit % strips * kStrip;
        const int64_t l1 = std::min(l0 + kStrip, (f + 1) * per_frame);
        for (int64_t l = l0; l < l1; ++l) {
          const int64_t token = b * tokens + l;
          const T *const x_read = x_rows.at(b, l), *const d_read = dout_rows.at(b, l);
          const float mean_read = stats[2 * token], rstd_read = stats[2 * token + 1];
          Sum along, total;
          for_vectors(channels, [&](int64_t i, auto n, auto k) {
            if (l > l0) {
              emit(i, n);
            }
            fetch_ahead(x_read + i);
            fetch_ahead(d_read + i);
            const Vec v = first((get(x_read + i, n) - Vec(mean_read)) * Vec(rstd_read), n);
            const Vec factor = scale.at(i);
            Vec d = get(d_read + i, n);
            if constexpr (form.silu) {
              const Vec into = v * factor, s = sigmoid(into);
              d = d * s * at::vec::fmadd(into, Vec(1) - s, Vec(1));
            }
            put(dscale_sum + i, at::vec::fmadd(d, v, get(dscale_sum + i, n)), n);
            if constexpr (form.centred) {
              put(dshift_sum + i, get(dshift_sum + i, n) + d, n);
            }
            d = d * factor;
            if constexpr (form.silu) {
              put(read.data() + i, d);
            }
            along.add_product(d, v, k);
            if constexpr (form.centred) {
              total.add(d, k);
            }
          });
          slope = along.total() / channels;
          offset = total.total() / channels;
          std::swap(read, written);
          x = x_read;
          d_out = d_read;
          mean = mean_read;
          rstd = rstd_read;
          dresidual = dresidual_rows.at(b, l);
          y = y_rows.at(b, l);
          dx = dx_out.at(token * channels);
          dy = dy_out.at(token * channels);
        }
        for_vectors(channels, [&](int64_t i, auto n, auto) { emit(i, n); });
      }
      dx_out.done();
      dy_out.done();
    };
    const auto each = [&](auto form) {
      parallel_rows(units, kStrip * channels, [&](int64_t begin, int64_t end) {
        run(form, begin, end);
      });
    };
    by_form(centred, has_residual, gate_BFC.has_value(), silu, each);
  });
  const auto over_strips = [&](const Floats& partial, const Tensor& like) {
    return sum_strips(partial, like, batch, frames, strips, channels);
  };
  if (shift_BFC) {
    dshift_BFC = over_strips(dshift, *shift_BFC);
  }
  if (gate_BFC) {
    dgate_BFC = over_strips(dgate, *gate_BFC);
  }
  return {dx_BLC, dy_BLC, dgate_BFC, over_strips(dscale, *scale_BFC), dshift_BFC};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sfkernels_cpp, m) {
  m.def(
      "norm_fwd(Tensor x, Tensor? y, Tensor? gate, Tensor? scale, Tensor? shift, float eps, "
      "bool centred, bool plus_one, bool silu=False, Tensor? bias_C=None, Tensor? before_BPC=None) "
      "-> (Tensor?, Tensor, Tensor)");
  m.def(
      "norm_bwd(Tensor? dresidual, Tensor dout, Tensor x, Tensor? y, Tensor? gate, Tensor? scale, "
      "Tensor? shift, Tensor stats, bool centred, bool plus_one, bool silu=False) "
      "-> (Tensor, Tensor?, Tensor?, Tensor, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(sfkernels_cpp, CPU, m) {
  m.impl("norm_fwd", TORCH_BOX(&norm_fwd));
  m.impl("norm_bwd", TORCH_BOX(&norm_bwd));
}

} // namespace sfkernels
