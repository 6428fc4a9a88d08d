// Checks of arguments, made by each op before it reads or writes anything: their loops trust them.
//
// A refusal is one sentence, which Python raises as a ValueError.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>

#include <torch/csrc/stable/tensor.h>

namespace sfkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Raises the sentence that `parts` make unless `holds`.
template <typename... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    std::ostringstream sentence;
    ((sentence << parts), ...);
    throw std::invalid_argument(sentence.str());
  }
}

constexpr int64_t kAny = std::numeric_limits<int64_t>::min(); // a size that may be any
constexpr int64_t kTooMany = int64_t{1} << 31; // elements of a table, of a frame

// dtypes of tensors. Those of kFloats are what by_dtype of rows.h tells apart.
using Dtypes = std::initializer_list<ScalarType>;
constexpr Dtypes kFloats{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
constexpr Dtypes kSigmas{
    ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};
constexpr Dtypes kIntegers{ScalarType::Int, ScalarType::Long};

// Sizes, dtypes or other numbers as "[2, any, 3]".
template <typename Numbers>
struct Listed {
  const Numbers& numbers;

  friend std::ostream& operator<<(std::ostream& to, const Listed& listed) {
    const char* between = "[";
    for (const auto number : listed.numbers) {
      to << between;
      if constexpr (std::is_same_v<std::decay_t<decltype(number)>, int64_t>) {
        number == kAny ? to << "any" : to << number;
      } else {
        to << number;
      }
      between = ", ";
    }
    return to << (*between == '[' ? "[]" : "]");
  }
};

template <typename Numbers>
Listed(const Numbers&) -> Listed<Numbers>;

inline void check_dtype(const char* name, const Tensor& t, Dtypes dtypes) {
  require(t.defined(), name, " is None: must be a tensor");
  require(t.is_cpu(), name, " is on another device: must be on the CPU");
  const ScalarType got = t.scalar_type();
  for (const ScalarType dtype : dtypes) {
    if (got == dtype) {
      return;
    }
  }
  require(false, name, " has dtype ", got, ": must be one of ", Listed{dtypes});
}

// The last `dense` dimensions lie side by side in memory, without gaps.
inline void check(
    const char* name,
    const Tensor& t,
    std::initializer_list<int64_t> sizes,
    Dtypes dtypes,
    int64_t dense = 1) {
  check_dtype(name, t, dtypes);
  const auto got = t.sizes(), strides = t.strides();
  const int64_t dims = static_cast<int64_t>(got.size());
  bool fits = got.size() == sizes.size();
  for (int64_t d = 0; fits && d < dims; ++d) {
    fits = sizes.begin()[d] == kAny || sizes.begin()[d] == got[d];
  }
  require(fits, name, " has shape ", Listed{got}, ": must be ", Listed{sizes});
  int64_t expected = 1;
  for (int64_t d = dims - 1; d >= dims - dense && expected > 0; --d) {
    require(got[d] == 1 || got[d] == 0 || strides[d] == expected, name, " has strides ",
            Listed{strides}, ": its last ", dense, " dimensions must lie side by side");
    expected *= got[d];
  }
}

inline void check(
    const char* name,
    const Optional& t,
    std::initializer_list<int64_t> sizes,
    Dtypes dtypes,
    int64_t dense = 1) {
  if (t) {
    check(name, *t, sizes, dtypes, dense);
  }
}

// A number that kernels take as a float and divide by or take the root of.
inline void check_positive(const char* name, double value) {
  require(
      value >= std::numeric_limits<float>::min() && value <= std::numeric_limits<float>::max(),
      name, "=", value, ": must be a positive number of float32");
}

inline void check_finite(const char* name, double value) {
  require(
      std::abs(value) <= std::numeric_limits<float>::max(), name, "=", value,
      ": must be a finite number of float32");
}

// Memory of a tensor of up to four dimensions: its start, the bytes from there to its end, and
// stride in bytes and size of the dimensions that have steps, the narrowest first.
struct Place {
  const char* start = nullptr;
  int64_t length = 0, element = 0;
  std::array<std::pair<int64_t, int64_t>, 4> steps{};

  explicit Place(const Tensor& t) : element(t.element_size()) {
    if (t.numel() == 0) {
      return;
    }
    const auto sizes = t.sizes(), strides = t.strides();
    length = element;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] > 1) {
        steps[d] = {strides[d] * element, sizes[d]};
        length += (sizes[d] - 1) * steps[d].first;
      }
    }
    start = static_cast<const char*>(t.data_ptr());
    std::sort(steps.begin(), steps.end());
  }

  // Tells whether two of its elements may share memory.
  bool overlaps_itself() const {
    int64_t reach = element;
    for (const auto& [stride, size] : steps) {
      if (size > 1 && stride < reach) {
        return true;
      }
      reach += std::max<int64_t>(size - 1, 0) * stride;
    }
    return false;
  }

  // Tells whether it may share memory with another tensor. It does not if the elements of one lie
  // between those of the other, which must have the same strides.
  bool overlaps(const Place& other) const {
    if (!length || !other.length || start + length <= other.start ||
        other.start + other.length <= start) {
      return false;
    }
    if (steps != other.steps || element != other.element) {
      return true;
    }
    const int64_t apart = std::abs(start - other.start);
    int64_t reach = element;
    for (auto step = steps.begin(); step != steps.end(); ++step) {
      const int64_t stride = step->first;
      const bool regular = stride > 0 && std::all_of(step, steps.end(), [&](const auto& outer) {
        return outer.first % stride == 0;
      });
      if (regular && reach <= apart % stride && apart % stride <= stride - reach) {
        return false;
      }
      reach += std::max<int64_t>(step->second - 1, 0) * stride;
    }
    return true;
  }
};

} // namespace sfkernels
