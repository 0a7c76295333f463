// Runs one call of the emulated kernels for linear layers: reads a case of tests/test_amx.py and writes the results.
#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace phydi;

namespace {

enum Call : int64_t { kLinear, kFactored, kFactoredGrad, kWeightGrad };

struct Case {
  int64_t call, plan, threads, rows, n, P, Q, p, q, R, along_p;
};

// What no kernel may write over is held apart by the address sanitizer.
template <class T>
struct Array {
  std::vector<T> entries;
  explicit Array(int64_t count) : entries(size_t(count)) {}
  T* data() { return entries.data(); }
};

template <class T>
Array<T> read(int64_t count) {
  Array<T> to(count);
  if (fread(to.data(), sizeof(T), size_t(count), stdin) != size_t(count)) exit(2);
  return to;
}

template <class T>
void write(Array<T>& from) {
  fwrite(from.data(), sizeof(T), from.entries.size(), stdout);
}

void check_released() {
  if (emulation::tiles.config.palette != 0) emulation::Tiles::fail("not released at the end of a task");
}

void run_task(Task task, void* context, int64_t index) {
  task(context, index);
  check_released();
}

// Every task on a thread of its own, with tile registers that nobody has set up.
void run_tasks(int64_t tasks, Task task, void* context) {
  std::vector<std::thread> running;
  for (int64_t j = 0; j < tasks; ++j) running.emplace_back(run_task, task, context, j);
  for (auto& thread : running) thread.join();
}

}  // namespace

int main() {
  Case c;
  if (fread(&c, sizeof c, 1, stdin) != 1) return 2;
  const int64_t in = c.Q * c.q, out = c.P * c.p;
  auto x = read<uint16_t>(c.rows * in), F = read<uint16_t>(c.n * c.p * c.q), bias = read<uint16_t>(out),
       other = read<uint16_t>(c.rows * out);
  auto A = read<float>(c.n * c.P * c.Q), U = read<float>(c.R * c.n), V = read<float>(c.R * c.P),
       W = read<float>(c.R * c.Q);
  Array<uint16_t> y(c.rows * out), dx(c.rows * in), dF(c.n * c.p * c.q);
  Array<float> dA(c.n * c.P * c.Q), dU(c.R * c.n), dV(c.R * c.P), dW(c.R * c.Q);

  const Threads threads{c.threads, run_tasks};
  const Rows x_rows{x.data(), in}, others{other.data(), out};
  const Weights weights =
      c.along_p ? Weights{F.data(), c.p, c.q, c.p * c.q, 1, c.p} : Weights{F.data(), c.p, c.q, c.p * c.q, c.q, 1};
  const Algebra algebra{A.data(), c.n, c.P, c.Q};
  const Factors factors{U.data(), V.data(), W.data(), c.R, c.n, c.P, c.Q};
  const Epilogue epilogue{bias.data(), others, 0.5, nullptr, true, y.data()};
  switch (c.call) {
    case kLinear:
      amx_bf16::phm_linear(DType::bf16, Plan(c.plan), c.rows, x_rows, algebra, weights, epilogue, threads);
      break;
    case kFactored:
      amx_bf16::phm_linear_factored(DType::bf16, c.rows, x_rows, factors, weights, epilogue, threads);
      break;
    case kFactoredGrad:
      amx_bf16::phm_linear_factored_grad(DType::bf16, c.rows, others, x_rows, factors, weights, dx.data(), dU.data(),
                                         dV.data(), dW.data(), dF.data(), threads);
      break;
    case kWeightGrad:
      amx_bf16::phm_linear_weight_grad(DType::bf16, Plan(c.plan), c.rows, others, x_rows, algebra, weights, dA.data(),
                                       dF.data(), threads);
      break;
  }
  check_released();
  for (auto* of_activations : {&y, &dx, &dF}) write(*of_activations);
  for (auto* of_algebra : {&dA, &dU, &dV, &dW}) write(*of_algebra);
}
