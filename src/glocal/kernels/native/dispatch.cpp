// Which instruction sets this machine runs, and which one is in use.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace glocal {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* named(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!std::strcmp(name, "baseline")) return kernels_baseline();
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return kernels_avx2();
  if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kernels_avx512();
#elif defined(__aarch64__)
  if (!std::strcmp(name, "neon")) return kernels_neon();
#else
  if (!std::strcmp(name, "baseline")) return kernels_baseline();
#endif
  return nullptr;
}

const char* const NAMES[] = {"baseline", "neon", "avx2", "avx512"};

}  // namespace

int runnable(const char** names) {
  int n = 0;
  for (const char* name : NAMES)
    if (named(name)) names[n++] = name;
  return n;
}

void select(const char* name) {
  const Kernels* kernels = named(name);
  if (!kernels) {
    const char* names[4];
    int n = runnable(names);
    std::string text = std::string("GLOCAL_ISA asks for '") + name + "'; this machine runs";
    for (int i = 0; i < n; ++i) text += std::string(i ? ", " : " ") + names[i];
    throw std::runtime_error(text);
  }
  chosen.store(kernels);
}

const Kernels& current() {
  const Kernels* kernels = chosen.load();
  if (!kernels) {
    const char* wanted = std::getenv("GLOCAL_ISA");
    const char* names[4];
    int n = runnable(names);
    select(wanted && *wanted ? wanted : names[n - 1]);
    kernels = chosen.load();
  }
  return *kernels;
}

}  // namespace glocal
