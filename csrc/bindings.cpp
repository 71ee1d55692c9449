// The only pybind11 file: the registry of kernels, the choice of the instruction set, and `launch`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pthread.h>

#include <atomic>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.h"
#include "parallel.h"

namespace py = pybind11;

namespace vqfast {
namespace {

struct Entry {
  std::string signature;
  KernelFn fn[kIsaCount] = {};
  RefuseFn refuse = nullptr;
};

// a function, so that it exists before the first static registration
std::map<std::string, Entry>& registry() {
  static std::map<std::string, Entry> entries;
  return entries;
}

const char* const isa_names[kIsaCount] = {"avx512_vnni", "avx512", "avx2", "base"};
Isa selected = kBase;
std::atomic<bool> forked{false};

bool supports(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  if (isa == kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
  if (isa == kAvx512) return avx512;
  if (isa == kAvx2) return avx2;
#endif
  return isa == kBase;
}

const Entry& find(const std::string& name) {
  const auto it = registry().find(name);
  if (it == registry().end()) throw std::invalid_argument("no kernel named " + name);
  return it->second;
}

std::vector<View> read_views(const py::list& tensors) {
  std::vector<View> views(tensors.size());
  for (size_t i = 0; i < views.size(); ++i) {
    View& v = views[i];
    v = View{};
    if (tensors[i].is_none()) continue;
    const auto t = py::cast<py::tuple>(tensors[i]);
    const auto shape = py::cast<py::tuple>(t[2]), stride = py::cast<py::tuple>(t[3]);
    if (shape.size() > 8) throw std::invalid_argument("more than 8 dimensions");
    v.data = reinterpret_cast<void*>(py::cast<uintptr_t>(t[0]));
    v.dtype = static_cast<DType>(py::cast<int>(t[1]));
    v.ndim = static_cast<int32_t>(shape.size());
    for (size_t d = 0; d < shape.size(); ++d) {
      v.shape[d] = py::cast<int64_t>(shape[d]);
      v.stride[d] = py::cast<int64_t>(stride[d]);
    }
  }
  return views;
}

std::vector<Scalar> read_scalars(const py::list& numbers) {
  std::vector<Scalar> scalars(numbers.size());
  for (size_t i = 0; i < scalars.size(); ++i) {
    const py::handle x = numbers[i];
    if (PyLong_Check(x.ptr())) {  // bool included
      const int64_t bits = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(x.ptr()));
      if (PyErr_Occurred()) throw py::error_already_set();
      scalars[i] = {bits, static_cast<double>(bits)};
    } else {
      scalars[i] = {0, py::cast<double>(x)};
    }
  }
  return scalars;
}

KernelFn function_of(const std::string& name) {
  const KernelFn fn = find(name).fn[selected];
  if (!fn) throw std::invalid_argument(name + " has no kernel for " + isa_names[selected]);
  return fn;
}

void launch(const std::string& name, const py::list& tensors, const py::list& numbers, int threads) {
  const KernelFn fn = function_of(name);
  const auto views = read_views(tensors);
  const auto scalars = read_scalars(numbers);
  const Args args{views.data(), static_cast<int>(views.size()), scalars.data(),
                  static_cast<int>(scalars.size()), std::max(1, threads)};
  py::gil_scoped_release release;
  fn(args);
}

std::string refuse(const std::string& name, const py::list& tensors, const py::list& numbers) {
  const RefuseFn fn = find(name).refuse;
  if (!fn) return "";
  const auto views = read_views(tensors);
  const auto scalars = read_scalars(numbers);
  const char* reason = fn({{views.data(), static_cast<int>(views.size())},
                           {scalars.data(), static_cast<int>(scalars.size())}});
  return reason ? reason : "";
}

std::map<std::string, std::string> kernels() {
  std::map<std::string, std::string> out;
  for (const auto& [name, entry] : registry()) out[name] = entry.signature;
  return out;
}

std::vector<std::string> supported() {
  std::vector<std::string> out;
  for (int i = 0; i < kIsaCount; ++i)
    if (supports(static_cast<Isa>(i))) out.push_back(isa_names[i]);
  return out;
}

void select(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name != isa_names[i]) continue;
    if (!supports(static_cast<Isa>(i))) throw std::invalid_argument("this CPU lacks " + name);
    selected = static_cast<Isa>(i);
    return;
  }
  throw std::invalid_argument("no instruction set named " + name);
}

}  // namespace

RegisterKernel::RegisterKernel(const char* name, const char* signature, Isa isa, KernelFn fn) {
  Entry& entry = registry()[name];
  entry.signature = signature;
  entry.fn[isa] = fn;
}

RegisterRefusal::RegisterRefusal(const char* name, RefuseFn fn) { registry()[name].refuse = fn; }

void no_such_input(int i, int size) {
  throw std::out_of_range("a refusal reads input " + std::to_string(i) + " of " +
                          std::to_string(size));
}

void run_kernel(const char* name, const Args& args) { function_of(name)(args); }

bool has_avx512_bf16() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  return selected <= kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

}  // namespace vqfast

PYBIND11_MODULE(_C, m) {
  using namespace vqfast;
  pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  m.doc() = "C++ kernels of vqfast; tensors cross as (pointer, dtype, shape, strides)";
  m.def("kernels", &kernels, "{name: signature}");
  m.def("supported", &supported, "instruction sets of this CPU, best first");
  m.def("select", &vqfast::select, "choose the instruction set of all further launches");
  m.def("selected", [] { return std::string(isa_names[selected]); });
  m.def("refuse", &refuse, "a reason why a kernel cannot run these inputs, or an empty string");
  m.def("launch", &launch, "run a kernel; the GIL is released");
}
