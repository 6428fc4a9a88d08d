// RMSNorm of queries and keys with 3-D RoPE and the append to a ring, its backward, and the table.
//
// P = D/2 rotated pairs of a head; every head of a token rotates alike.
#include "rows.h"

namespace sfkernels {
namespace {

// Even and odd channels of the pairs p to p + n of a row.
template <typename T>
std::pair<Vec, Vec> get_pairs(const T* row, int64_t p, int64_t n = kLanes) {
  const int64_t low = std::min(2 * n, kLanes);
  const Vec a = get(row + 2 * p, low);
  const Vec b = n == kLanes ? get(row + 2 * p + kLanes) : get(row + 2 * p + low, 2 * n - low);
  return at::vec::deinterleave2(a, b);
}

// Floats of a row, the even channels apart from the odd ones. A vector may begin at any pair.
struct Pairs {
  Floats even, odd;

  explicit Pairs(int64_t pairs) : even(padded(pairs) + kLanes), odd(padded(pairs) + kLanes) {}

  template <typename T>
  void read(const T* row, int64_t pairs) {
    for_vectors(pairs, [&](int64_t p, auto n, auto) {
      const auto [a, b] = get_pairs(row, p, n);
      put(even.data() + p, a);
      put(odd.data() + p, b);
    });
  }
};

// What is the same for every head, once for each.
void repeat(const Pairs& head, int64_t pairs, int64_t heads, Pairs& all) {
  for (int64_t h = 0; h < heads; ++h) {
    std::copy_n(head.even.data(), pairs, all.even.data() + h * pairs);
    std::copy_n(head.odd.data(), pairs, all.odd.data() + h * pairs);
  }
}

// Weights of all channels, from those of all or of one head.
Pairs weights_of(const Optional& weight_C, int64_t channels) {
  Pairs all(channels / 2);
  if (weight_C) {
    const int64_t pairs = weight_C->size(0) / 2;
    Pairs given(pairs);
    by_dtype(weight_C->scalar_type(), [&](auto zero) {
      given.read(data<decltype(zero)>(*weight_C), pairs);
    });
    repeat(given, pairs, channels / 2 / pairs, all);
  }
  return all;
}

// Cosines and sines of one token's rotation, repeated for every head.
class Rotation {
 public:
  Rotation(const Tensor& table_LP2, int64_t heads)
      : table_(table_LP2),
        stride_b_(table_LP2.dim() == 4 ? table_LP2.stride(0) : 0),
        pairs_(table_LP2.size(-2)),
        heads_(heads),
        head_(pairs_),
        all_(pairs_ * heads) {}

  void move_to(int64_t b, int64_t l) {
    by_dtype(table_.scalar_type(), [&](auto zero) {
      head_.read(data<decltype(zero)>(table_) + b * stride_b_ + l * 2 * pairs_, pairs_);
    });
    repeat(head_, pairs_, heads_, all_);
  }

  // A vector of pairs from pair p on, rotated; back if `back`.
  std::pair<Vec, Vec> turn(Vec even, Vec odd, int64_t p, bool back = false) const {
    const Vec cos = get(all_.even.data() + p), s = get(all_.odd.data() + p);
    const Vec sin = back ? s.neg() : s;
    return {at::vec::fmadd(even, cos, (odd * sin).neg()), at::vec::fmadd(even, sin, odd * cos)};
  }

 private:
  const Tensor& table_;
  const int64_t stride_b_, pairs_, heads_;
  Pairs head_, all_;
};

template <typename T>
void write_pairs(const Output<T>& out, T* row, int64_t p, Vec even, Vec odd, int64_t n) {
  const auto [a, b] = at::vec::interleave2(even, odd);
  constexpr std::integral_constant<int64_t, kLanes> all;
  if (n == kLanes) {
    out.write(row + 2 * p, a, all);
    out.write(row + 2 * p + kLanes, b, all);
  } else {
    const int64_t low = std::min(2 * n, kLanes);
    put(row + 2 * p, a, low);
    put(row + 2 * p + low, b, 2 * n - low);
  }
}

template <typename T>
void copy(const Output<T>& out, T* to, const T* from, int64_t channels) {
  for_vectors(channels, [&](int64_t i, auto n, auto) {
    fetch_ahead(from + i);
    out.write(to + i, get(from + i, n), n);
  });
}

// Sizes of a pass. channels: of one of q, k and v; norms: that a row of it takes, none, one or one
// for each head.
struct Sizes {
  int64_t batch, tokens, channels, head_dim, heads, norms;
};

// Raises unless these are the projection of a pass, [B, L, 3·H·D] or three [B, L, H·D], and what
// goes with it.
Sizes check_qkv(
    const Tensor& qkv_BLC,
    const Optional& k_BLC,
    const Optional& v_BLC,
    const Optional& q_weight_C,
    const Optional& k_weight_C,
    const Tensor& table_LP2) {
  check("qkv", qkv_BLC, {kAny, kAny, kAny}, kFloats);
  const int64_t batch = qkv_BLC.size(0), tokens = qkv_BLC.size(1), of_all = qkv_BLC.size(2);
  if (table_LP2.dim() == 4) {
    check("table", table_LP2, {batch, tokens, kAny, 2}, kFloats, 3);
  } else {
    check("table", table_LP2, {tokens, kAny, 2}, kFloats, 3);
  }
  const int64_t pairs = table_LP2.size(-2);
  require(pairs > 0 && pairs < kTooMany, "table has ", pairs, " pairs: must have one or more");
  require(k_BLC.has_value() == v_BLC.has_value(), "k and v belong together: give both or none");
  const int64_t three = k_BLC ? 1 : 3;
  require(
      of_all > 0 && of_all % (2 * three * pairs) == 0, "qkv has ", of_all,
      " channels: must be a multiple of ", three, " × head dim ", 2 * pairs);
  check("k", k_BLC, {batch, tokens, of_all}, {qkv_BLC.scalar_type()});
  check("v", v_BLC, {batch, tokens, of_all}, {qkv_BLC.scalar_type()});
  require(
      q_weight_C.has_value() == k_weight_C.has_value(),
      "q_weight and k_weight belong together: give both or none");
  const int64_t channels = of_all / three, heads = channels / (2 * pairs);
  int64_t norms = 0;
  if (q_weight_C) {
    const bool of_heads = q_weight_C->dim() == 1 && q_weight_C->size(0) == 2 * pairs;
    norms = of_heads ? heads : 1;
    check("q_weight", q_weight_C, {channels / norms}, kFloats);
    check("k_weight", k_weight_C, {channels / norms}, kFloats);
  }
  return {batch, tokens, channels, 2 * pairs, heads, norms};
}

// Rows of q, k and v, each a third of the fused projection's or a tensor's own.
template <typename T>
std::array<Rows<T>, 3> parts(
    const Tensor& qkv_BLC, const Optional& k_BLC, const Optional& v_BLC, int64_t channels) {
  std::array<Rows<T>, 3> rows{Rows<T>(qkv_BLC), Rows<T>(k_BLC), Rows<T>(v_BLC)};
  for (int64_t i = 1; i < 3 && !k_BLC; ++i) {
    rows[i] = rows[0];
    rows[i].start += i * channels;
  }
  return rows;
}

// Raises unless a chunk's frames can be written to slots of their own in two rings that share no
// memory with each other or with what is read meanwhile. Returns the slots, of all samples or of
// one for all.
Ints check_rings(
    const Tensor& k_ring_BSHD,
    const Tensor& v_ring_BSHD,
    const Tensor& slot_F,
    std::initializer_list<Optional> read,
    ScalarType dtype,
    const Sizes& sizes) {
  const int64_t batch = sizes.batch, tokens = sizes.tokens;
  if (slot_F.dim() == 2) {
    check("slot_F", slot_F, {batch, kAny}, kIntegers, 0);
  } else {
    check("slot_F", slot_F, {kAny}, kIntegers, 0);
  }
  const int64_t frames = slot_F.size(-1), held = k_ring_BSHD.dim() > 1 ? k_ring_BSHD.size(1) : 0;
  require(
      tokens > 0 && frames > 0 && tokens % frames == 0 && held % (tokens / frames) == 0,
      "slot_F names ", frames, " frames: ", tokens, " tokens and a ring of ", held,
      " must be whole frames");
  const auto check_ring = [&](const char* name, const Tensor& ring) {
    check(name, ring, {batch, held, sizes.heads, sizes.head_dim}, {dtype}, 2);
    const Place place(ring);
    require(!place.overlaps_itself(), name, " has strides ", Listed{ring.strides()},
            ": writing one of its rows changes another");
    for (const Optional& t : read) {
      require(
          !t || !place.overlaps(Place(*t)), name, " shares memory with what is read to fill it");
    }
    return place;
  };
  const Place k_place = check_ring("k_ring", k_ring_BSHD);
  const Place v_place = check_ring("v_ring", v_ring_BSHD);
  require(!k_place.overlaps(v_place), "k_ring and v_ring share memory: must be two rings");
  const Ints slots = integers(slot_F);
  const int64_t last = held / (tokens / frames) - 1;
  for (const int64_t slot : slots) {
    require(0 <= slot && slot <= last, "slot_F has ", slot, ": the ring's slots are 0 to ", last);
  }
  Ints sorted = slots;
  for (auto row = sorted.begin(); row != sorted.end(); row += frames) {
    std::sort(row, row + frames);
    require(
        std::adjacent_find(row, row + frames) == row + frames, "slot_F is ", Listed{slots},
        ": each frame needs a slot of its own");
  }
  return slots;
}

std::tuple<Tensor, Optional, Optional, Optional> qk_norm_rope_fwd(
    const Tensor& qkv_BLC,
    const Optional& k_BLC,
    const Optional& v_BLC,
    const Optional& q_weight_C,
    const Optional& k_weight_C,
    const Tensor& table_LP2,
    const Optional& k_ring_BSHD,
    const Optional& v_ring_BSHD,
    const Optional& slot_F,
    double eps,
    bool rotate_k) {
  const Sizes sizes = check_qkv(qkv_BLC, k_BLC, v_BLC, q_weight_C, k_weight_C, table_LP2);
  const int64_t batch = sizes.batch, tokens = sizes.tokens, channels = sizes.channels;
  const int64_t head_dim = sizes.head_dim, heads = sizes.heads, norms = sizes.norms;
  check_positive("eps", eps);
  require(
      k_ring_BSHD.has_value() == slot_F.has_value() &&
          v_ring_BSHD.has_value() == slot_F.has_value(),
      "k_ring, v_ring and slot_F belong together: give all or none");
  const Ints shape{batch, tokens, heads, head_dim};
  const Tensor q_BLHD = empty(qkv_BLC, shape);
  const Tensor k_BSHD = k_ring_BSHD ? *k_ring_BSHD : empty(qkv_BLC, shape);
  const Tensor v_BSHD = v_ring_BSHD ? *v_ring_BSHD : empty(qkv_BLC, shape);
  Optional rstd_BLN;
  Ints slots{0};
  int64_t frames = 1;
  if (slot_F) {
    slots = check_rings(
        *k_ring_BSHD, *v_ring_BSHD, *slot_F,
        {qkv_BLC, k_BLC, v_BLC, q_weight_C, k_weight_C, table_LP2, *slot_F},
        qkv_BLC.scalar_type(), sizes);
    frames = slot_F->size(-1);
  } else {
    rstd_BLN = empty(qkv_BLC, {batch, tokens, 2 * norms}, ScalarType::Float);
  }
  const int64_t per_slot = tokens / frames;
  const int64_t slots_b = static_cast<int64_t>(slots.size()) > frames ? frames : 0;
  float* const stats = rstd_BLN && norms ? data<float>(*rstd_BLN) : nullptr;
  const Pairs q_weight = weights_of(q_weight_C, channels);
  const Pairs k_weight = weights_of(k_weight_C, channels);
  const int64_t runs = std::max<int64_t>(norms, 1), width = channels / runs;

  by_dtype(qkv_BLC.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto in = parts<T>(qkv_BLC, k_BLC, v_BLC, channels);
    const Rows<T> q_rows(q_BLHD), k_rows(k_BSHD), v_rows(v_BSHD);
    const auto output = [&](const Rows<T>& rows) {
      const int64_t written = batch * tokens * channels;
      return Output<T>(rows.start, written, {rows.stride_b, rows.stride_l, width});
    };
    const Output<T> q_out = output(q_rows), k_out = output(k_rows), v_out = output(v_rows);
    parallel_rows(batch * tokens, 3 * channels, [&](int64_t begin, int64_t end) {
      Rotation rotation(table_LP2, heads);
      // One of q and k, norm by norm.
      const auto norm = [&](const Output<T>& out, T* to, const T* x, const Pairs& weight,
                            bool turned, float* rstds) {
        for (int64_t run = 0; run < runs; ++run, to += width, x += width) {
          const int64_t first = run * width / 2;
          Vec rstd(1);
          if (norms) {
            Sum squares;
            for_vectors(width, [&](int64_t i, auto n, auto k) {
              fetch_ahead(x + i);
              const Vec v = get(x + i, n);
              squares.add_product(v, v, k);
            });
            const float mean = squares.total() / width;
            const float one = 1 / std::sqrt(mean + static_cast<float>(eps));
            rstd = Vec(one);
            if (rstds) {
              rstds[run] = one;
            }
          }
          for_vectors(width / 2, [&](int64_t p, auto n, auto) {
            auto [even, odd] = get_pairs(x, p, n);
            if (norms) {
              even = even * rstd * get(weight.even.data() + first + p);
              odd = odd * rstd * get(weight.odd.data() + first + p);
            }
            if (turned) {
              std::tie(even, odd) = rotation.turn(even, odd, first + p);
            }
            write_pairs(out, to, p, even, odd, n);
          });
        }
      };
      for (int64_t token = begin; token < end; ++token) {
        const int64_t b = token / tokens, l = token % tokens;
        const int64_t to = slots[b * slots_b + l / per_slot] * per_slot + l % per_slot;
        float* const q_rstd = stats ? stats + 2 * norms * token : nullptr;
        rotation.move_to(b, l);
        norm(q_out, q_rows.at(b, l), in[0].at(b, l), q_weight, true, q_rstd);
        norm(k_out, k_rows.at(b, to), in[1].at(b, l), k_weight, rotate_k,
             stats ? q_rstd + norms : nullptr);
        copy(v_out, v_rows.at(b, to), in[2].at(b, l), channels);
      }
      q_out.done();
      k_out.done();
      v_out.done();
    });
  });
  if (slot_F) {
    return {q_BLHD, std::nullopt, std::nullopt, std::nullopt};
  }
  return {q_BLHD, k_BSHD, v_BSHD, rstd_BLN};
}

std::tuple<Tensor, Optional, Optional, Optional, Optional> qk_norm_rope_bwd(
    const Tensor& dq_BLHD,
    const Tensor& dk_BLHD,
    const Tensor& dv_BLHD,
    const Tensor& qkv_BLC,
    const Optional& k_BLC,
    const Optional& v_BLC,
    const Optional& q_weight_C,
    const Optional& k_weight_C,
    const Tensor& table_LP2,
    const Tensor& rstd_BLN) {
  const Sizes sizes = check_qkv(qkv_BLC, k_BLC, v_BLC, q_weight_C, k_weight_C, table_LP2);
  const int64_t batch = sizes.batch, tokens = sizes.tokens, channels = sizes.channels;
  const int64_t head_dim = sizes.head_dim, heads = sizes.heads, norms = sizes.norms;
  const std::array<std::pair<const char*, const Tensor&>, 3> gradients{
      {{"dq", dq_BLHD}, {"dk", dk_BLHD}, {"dv", dv_BLHD}}};
  for (const auto& [name, t] : gradients) {
    check(name, t, {batch, tokens, heads, head_dim}, {qkv_BLC.scalar_type()}, 2);
  }
  check("rstd", rstd_BLN, {batch, tokens, 2 * norms}, {ScalarType::Float}, 3);
  const int64_t strips = (tokens + kStrip - 1) / kStrip, units = batch * strips;
  const Tensor dqkv_BLC = empty(qkv_BLC, sizes_of(qkv_BLC));
  Optional dk_in, dv_in;
  if (k_BLC) {
    dk_in = empty(qkv_BLC, sizes_of(qkv_BLC));
    dv_in = empty(qkv_BLC, sizes_of(qkv_BLC));
  }
  const float* const stats = norms ? data<float>(rstd_BLN) : nullptr;
  const int64_t runs = std::max<int64_t>(norms, 1), width = channels / runs;
  Floats q_weight(padded(width)), k_weight(padded(width));
  Floats dq_weight, dk_weight;
  if (norms) {
    widen(q_weight, *q_weight_C, 0, width);
    widen(k_weight, *k_weight_C, 0, width);
    dq_weight.resize(units * channels);
    dk_weight.resize(units * channels);
  }

  by_dtype(qkv_BLC.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> dq_rows(dq_BLHD), dk_rows(dk_BLHD), dv_rows(dv_BLHD);
    const auto in = parts<T>(qkv_BLC, k_BLC, v_BLC, channels);
    const auto to = parts<T>(dqkv_BLC, dk_in, dv_in, channels);
    const int64_t row = qkv_BLC.size(2);
    std::array<Output<T>, 3> outs;
    for (int64_t i = 0; i < 3; ++i) {
      outs[i] = Output<T>(to[i].start, batch * tokens * channels, {row, width});
    }
    parallel_rows(units, 3 * kStrip * channels, [&](int64_t begin, int64_t end) {
      Rotation rotation(table_LP2, heads);
      Floats turned_back(padded(width));
      const Output<float> turned(turned_back.data(), 0, {});
      // One of q and k, norm by norm.
      const auto norm = [&](const Output<T>& out, const T* dout, const T* x, const Floats& weight,
                            const float* rstds, float* dweight, T* dx) {
        for (int64_t run = 0; run < runs; ++run, dout += width, x += width, dx += width) {
          const int64_t first = run * width / 2;
          for_vectors(width / 2, [&](int64_t p, auto n, auto) {
            fetch_ahead(dout + 2 * p);
            fetch_ahead(dout + 2 * p + kLanes);
            const auto [even, odd] = get_pairs(dout, p, n);
            const auto [a, b] = rotation.turn(even, odd, first + p, true);
            if (norms) {
              write_pairs(turned, turned_back.data(), p, a, b, n);
            } else {
              write_pairs(out, dx, p, a, b, n);
            }
          });
          if (!norms) {
            continue;
          }
          const float rstd = rstds[run];
          Sum along;
          for_vectors(width, [&](int64_t i, auto n, auto k) {
            fetch_ahead(x + i);
            const Vec d = get(turned_back.data() + i, n), v = get(x + i, n) * Vec(rstd);
            put(dweight + i, at::vec::fmadd(d, v, get(dweight + i, n)), n);
            const Vec dnormed = d * get(weight.data() + i);
            put(turned_back.data() + i, dnormed, n);
            along.add_product(dnormed, v, k);
          });
          dweight += width;
          const Vec slope(along.total() / width);
          for_vectors(width, [&](int64_t i, auto n, auto) {
            const Vec v = get(x + i, n) * Vec(rstd), d = get(turned_back.data() + i, n);
            out.write(dx + i, at::vec::fnmadd(v, slope, d) * Vec(rstd), n);
          });
        }
      };
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / strips, l0 = unit % strips * kStrip;
        for (int64_t l = l0; l < std::min(tokens, l0 + kStrip); ++l) {
          const int64_t token = b * tokens + l, at = token * row;
          const float* const rstds = stats ? stats + 2 * norms * token : nullptr;
          rotation.move_to(b, l);
          norm(outs[0], dq_rows.at(b, l), in[0].at(b, l), q_weight, rstds,
               dq_weight.data() + unit * channels, to[0].start + at);
          norm(outs[1], dk_rows.at(b, l), in[1].at(b, l), k_weight, stats ? rstds + norms : nullptr,
               dk_weight.data() + unit * channels, to[1].start + at);
          copy(outs[2], to[2].start + at, dv_rows.at(b, l), channels);
        }
      }
      for (const auto& out : outs) {
        out.done();
      }
    });
  });
  if (!norms) {
    return {dqkv_BLC, dk_in, dv_in, std::nullopt, std::nullopt};
  }
  // Of a norm of each head every head adds to the gradient, as every strip does.
  const auto over_strips = [&](const Floats& partial, const Tensor& like) {
    return sum_strips(partial, like, batch, 1, strips * norms, width);
  };
  return {
      dqkv_BLC, dk_in, dv_in, over_strips(dq_weight, *q_weight_C),
      over_strips(dk_weight, *k_weight_C)};
}

// Angles in double, each of an axis' positions once; the rest is copying.
Tensor rope_table(const Tensor& frame_F, const Ints& grid, int64_t head_dim, double theta) {
  check("frame_F", frame_F, {kAny}, kIntegers, 0);
  const auto few = [](int64_t n) { return 1 <= n && n < kTooMany; };
  require(
      grid.size() == 2 && few(grid[0]) && few(grid[1]) && few(grid[0] * grid[1]), "grid is ",
      Listed{grid}, ": must be two sizes of 1 or more, together of fewer than ", kTooMany, " tokens");
  require(head_dim > 0 && head_dim % 2 == 0, "head_dim=", head_dim, ": must be even and positive");
  const int64_t count = frame_F.size(0), height = grid[0], width = grid[1];
  const int64_t shown = std::max<int64_t>(count, 1);
  require(
      few(head_dim) && few(height * width * head_dim) && few(shown) &&
          few(shown * height * width * head_dim),
      "a table of ", count, " frames of ", height, " x ", width, " tokens and head_dim=", head_dim,
      ": must have fewer than ", kTooMany, " elements");
  check_positive("theta", theta);
  const Ints frames = integers(frame_F);
  const int64_t pairs = head_dim / 2, across = pairs / 3, along = pairs - 2 * across;
  const Tensor table_LP2 = empty(frame_F, {count * height * width, pairs, 2}, ScalarType::Float);
  if (count == 0) {
    return table_LP2;
  }
  float* const out = data<float>(table_LP2);
  const auto angles = [theta](int64_t axis_pairs, int64_t positions, const auto& position_of) {
    Floats values(positions * axis_pairs * 2);
    for (int64_t p = 0; p < axis_pairs; ++p) {
      const double frequency = std::pow(theta, -static_cast<double>(p) / axis_pairs);
      for (int64_t i = 0; i < positions; ++i) {
        const double angle = static_cast<double>(position_of(i)) * frequency;
        values[2 * (i * axis_pairs + p)] = static_cast<float>(std::cos(angle));
        values[2 * (i * axis_pairs + p) + 1] = static_cast<float>(std::sin(angle));
      }
    }
    return values;
  };
  const auto itself = [](int64_t i) { return i; };
  const Floats of_time = angles(along, count, [&](int64_t i) { return frames[i]; });
  const Floats of_height = angles(across, height, itself), of_width = angles(across, width, itself);
  parallel_rows(count * height * width, 2 * pairs, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      float* to = out + l * 2 * pairs;
      const auto append = [&to](const Floats& from, int64_t position, int64_t axis_pairs) {
        to = std::copy_n(from.data() + 2 * position * axis_pairs, 2 * axis_pairs, to);
      };
      append(of_time, l / (height * width), along);
      append(of_height, l / width % height, across);
      append(of_width, l % width, across);
    }
  });
  return table_LP2;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sfkernels_cpp, m) {
  m.def(
      "qk_norm_rope_fwd(Tensor qkv, Tensor? k, Tensor? v, Tensor? q_weight, Tensor? k_weight, "
      "Tensor table, Tensor(a!)? k_ring, Tensor(b!)? v_ring, Tensor? slot, float eps, "
      "bool rotate_k=True) -> (Tensor, Tensor?, Tensor?, Tensor?)");
  m.def(
      "qk_norm_rope_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? k, Tensor? v, "
      "Tensor? q_weight, Tensor? k_weight, Tensor table, Tensor rstd) "
      "-> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def("rope_table(Tensor frame, int[2] grid, int head_dim, float theta) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sfkernels_cpp, CPU, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
  m.impl("rope_table", TORCH_BOX(&rope_table));
}

} // namespace sfkernels
