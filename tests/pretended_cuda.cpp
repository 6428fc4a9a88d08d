// The device of pretended_cuda.py: tensors of cuda:0 whose memory is the host's. Every op on them
// runs on CPU tensors of the same memory, through one fallback, which refuses what a GPU would and
// keeps what a capture records.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <functional>
#include <map>
#include <set>

using at::Tensor, c10::Device, c10::IValue, torch::jit::Stack;
constexpr auto CUDA = c10::DeviceType::CUDA;
const Device HOST(c10::kCPU), GPU(CUDA, 0);

struct Graph {
  std::vector<std::function<void()>> work;
  std::vector<Tensor> made;
  std::set<const void*> born;  // memory of the graph's own
  std::map<const void*, std::pair<c10::Storage, int>> uses;  // and from elsewhere, how often
  std::map<void*, std::pair<c10::Storage, std::string>> before;  // of what the capture writes
  std::string refused;
  void uses_once(const c10::Storage& at) {
    auto& [storage, count] = uses[at.data()];
    storage = at;
    count++;
  }
  void writes(const c10::Storage& at) {
    auto* data = static_cast<char*>(at.mutable_data());
    if (!before.contains(data)) before[data] = {at, std::string(data, data + at.nbytes())};
  }
};
Graph* recorded = nullptr;

bool waits_are_errors = false;  // torch.cuda.set_sync_debug_mode("error")

void refuse_wait(const std::string& what) {
  TORCH_CHECK(recorded || !waits_are_errors, "called a synchronizing CUDA operation (", what, ")");
  if (!recorded) return;
  recorded->refused = what;
  TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (", what, ")");
}

struct Counted {  // keeps memory alive, and counts the GPU's
  std::variant<c10::Storage, c10::DataPtr> kept;
  int64_t bytes;
  static inline std::atomic<int64_t> now = 0, most = 0;
  Counted(std::variant<c10::Storage, c10::DataPtr> kept, int64_t bytes)
      : kept(std::move(kept)), bytes(bytes) { most = std::max(most.load(), now += bytes); }
  ~Counted() { now -= bytes; }
  static void drop(void* self) { delete static_cast<Counted*>(self); }
};

std::set<const void*> pinned;
template <bool PIN>
struct Memory : c10::Allocator {
  static void drop(void* data) { pinned.erase(data); c10::GetCPUAllocator()->raw_deallocate(data); }
  c10::DataPtr allocate(size_t bytes) override {
    if (PIN) {
      void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
      pinned.insert(data);
      return {data, data, drop, HOST};
    }
    auto data = c10::GetCPUAllocator()->allocate(bytes);
    void* at = data.get();
    if (recorded) recorded->born.insert(at);
    return {at, new Counted(std::move(data), bytes), Counted::drop, GPU};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Memory<false> memory;
Memory<true> pinned_memory;

// A tensor of the same memory under the other device.
Tensor relabelled(const Tensor& t) {
  const Device to = t.is_cpu() ? GPU : HOST;
  const size_t bytes = t.storage().nbytes();
  auto* kept = new Counted(t.storage(), to == GPU ? bytes : 0);
  c10::DataPtr data(t.storage().mutable_data(), kept, Counted::drop, to);
  if (recorded && to == GPU) recorded->born.insert(data.get());
  auto* allocator = to == GPU ? &memory : c10::GetCPUAllocator();
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), allocator, true);
  auto key = to == GPU ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}

struct Generator : at::CPUGeneratorImpl {
  Generator() : CPUGeneratorImpl() { at(GPU); }
  void at(Device device) { device_ = device; }
};

// What a GPU waits for, so that the host knows a size or a value.
const std::set<std::string> WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave"};

template <class F>  // for each tensor of a value
void each(IValue& value, F f) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = f(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorList().copy();
    for (size_t i = 0; i < list.size(); i++) list.set(i, f(list.get(i)));
    value = list;
  } else if (value.isOptionalTensorList()) {
    auto list = value.toOptionalTensorList().copy();
    for (size_t i = 0; i < list.size(); i++)
      if (std::optional<Tensor> t = list.get(i); t && t->defined()) list.set(i, f(*t));
    value = list;
  }
}

void run(const c10::OperatorHandle& op, Stack* stack, const std::vector<at::Generator>& drawn) {
  for (auto& g : drawn) static_cast<Generator*>(g.unsafeGetGeneratorImpl())->at(HOST);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& g : drawn) static_cast<Generator*>(g.unsafeGetGeneratorImpl())->at(GPU);
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  TORCH_CHECK_NOT_IMPLEMENTED(name.starts_with("aten::"), name, " has no kernel for CUDA tensors");
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  const bool copies = name == "aten::copy_";
  const bool indexes = name.find("index") != std::string::npos;
  std::vector<std::pair<Tensor, Tensor>> given;  // here and on the host
  std::vector<Tensor> apart;
  std::vector<at::Generator> drawn;
  bool anything = false, written = false, made = false;
  if (WAITS.contains(name)) refuse_wait(name);
  for (size_t i = 0; i < count; i++) {
    IValue& value = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    if (value.isDevice()) value = HOST;
    if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device() == GPU, "Expected a 'cuda' device type for generator"
                  " but found '", value.toGenerator().device().type(), "'");
      drawn.push_back(value.toGenerator());
    }
    each(value, [&](const Tensor& t) {
      if (indexes && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte) && i == 1)
        refuse_wait(name + " by a mask");
      if (!t.is_cuda()) {
        TORCH_CHECK(t.is_cpu(), name, " of tensors on cuda:0 and ", t.device());
        if (t.dim() || copies) apart.push_back(t);
        return t;
      }
      anything = true;
      auto host = relabelled(t);
      given.push_back({t, host});
      written |= alias && alias->isWrite();
      if (recorded && alias && alias->isWrite()) recorded->writes(t.storage());
      return host;
    });
  }
  if (copies && !apart.empty()) {
    const bool waits = !(*stack)[first + 2].toBool() || !apart[0].is_pinned();
    if (waits) refuse_wait("a copy between host and device that waits, or is not of pinned memory");
    if (recorded && (*stack)[first].toTensor().is_same(apart[0])) recorded->writes(apart[0].storage());
  } else {
    TORCH_CHECK(apart.empty() || !anything || indexes, "Expected all tensors to be on the same device, "
                "but found at least two devices, cuda:0 and cpu! (", name, ")");
  }
  Stack arguments(stack->begin() + first, stack->end());
  run(op, stack, drawn);
  std::vector<IValue> results(stack->end() - schema.returns().size(), stack->end());
  for (auto& [here, host] : given)
    if (!host.sizes().equals(here.sizes())) {  // an output that was resized
      here.resize_(host.sizes());
      relabelled(here).copy_(host);
    }
  for (size_t i = stack->size() - results.size(); i < stack->size(); i++)
    each((*stack)[i], [&](const Tensor& t) {
      for (auto& [here, host] : given)
        if (t.is_same(host)) return here;
      if (copies) return apart[0];
      made = true;
      auto out = relabelled(t);
      if (recorded) recorded->made.push_back(out);
      return out;
    });
  if (!recorded || !(made || copies || written)) return;
  for (auto& [here, host] : given) recorded->uses_once(here.storage());
  recorded->work.push_back([op, arguments, results, drawn, made] {
    Stack again(arguments);
    run(op, &again, drawn);
    for (size_t i = 0; made && i < results.size(); i++) {
      std::vector<Tensor> to, from;
      for (auto [value, into] : {std::pair{results[i], &to}, {again[i], &from}})
        each(value, [&, into = into](const Tensor& t) { into->push_back(t); return t; });
      for (size_t j = 0; j < to.size(); j++)
        if (!to[j].is_same(from[j])) to[j].copy_(from[j]);
    }
  });
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
      C10_AS_INTARRAYREF_SLOW(stride), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      at::dtype_or_default(dtype));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  for (auto name : {"copy_", "convolution", "convolution_backward"})  // else by kinds of kernels
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  // Of sizes and strides alone, wherever the memory is.
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Tensor", static_cast<Tensor& (*)(Tensor&, const Tensor&)>(at::native::set_tensor_));
}
// The host's view of an argument of a kernel, which may write to it.
Tensor launched(const Tensor& t) {
  if (recorded) recorded->writes(t.storage());
  if (recorded) recorded->uses_once(t.storage());
  return relabelled(t);
}
TORCH_LIBRARY(pretended, m) { m.def("launched(Tensor t) -> Tensor", launched); }

// PyTorch has no hooks of CUDA and no guard, for which autograd and factories ask.
struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return pinned.contains(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
};
struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Stream only() const { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(Device) const noexcept override { return only(); }
  c10::Stream getDefaultStream(Device) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

extern "C" {
void install() {  // takes the place of the hooks that PyTorch has made
  static auto* hooks = new Hooks;
  std::memcpy((void*)&at::detail::getCUDAHooks(), (void*)hooks, sizeof(void*));
}
int64_t allocated() { return Counted::now; }
int64_t peak(bool reset) {
  if (reset) Counted::most = Counted::now.load();
  return Counted::most;
}
bool capturing() { return recorded; }
void sync_debug(bool error) { waits_are_errors = error; }
void refuse() { recorded->refused = "a wait"; }
void* begin() { return recorded = new Graph; }
// Puts back what the capture wrote: nothing has run. False where something was refused.
bool end(Graph* graph) {
  recorded = nullptr;
  for (auto& t : graph->made)
    if (t.nbytes()) std::memset(t.storage().mutable_data(), 0xff, t.storage().nbytes());
  for (auto& [data, was] : graph->before) std::memcpy(data, was.second.data(), was.second.size());
  graph->before.clear();
  for (auto* data : graph->born) graph->uses.erase(data);
  return graph->refused.empty();
}
void record(void (*work)()) { recorded->work.push_back(work); }
bool replay(Graph* graph) {  // false where what it uses is held by nobody else
  for (auto& [data, use] : graph->uses)
    if (use.first.use_count() <= size_t(use.second) + 1) return false;
  at::AutoDispatchBelowADInplaceOrView below;
  for (auto& work : graph->work) work();
  return true;
}
void destroy(Graph* graph) { delete graph; }
}
