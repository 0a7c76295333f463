// Runs the kernels on the cases of one file and writes their results to another: main IN OUT.
// A case is int64 numbers (operator, float64?, then the operator's own, see below) and the contiguous input arrays;
// the results follow each other without a header.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <vector>

#include "../../csrc/cuda/kernels.h"

namespace {

using namespace phydi::cuda;

std::ifstream input;
std::ofstream output;

// Heap memory of exactly the size of an array, so that AddressSanitizer guards its ends.
struct Array {
  size_t bytes;
  std::unique_ptr<char[]> data;

  // Unwritten results read as NaN.
  explicit Array(int64_t bytes_) : bytes(size_t(bytes_)), data(new char[bytes]) {
    std::memset(data.get(), 0xff, bytes);
  }

  static Array read(int64_t bytes) {
    Array array(bytes);
    input.read(array.data.get(), bytes);
    return array;
  }

  void write() const { output.write(data.get(), std::streamsize(bytes)); }
};

int64_t number() {
  int64_t value = 0;
  input.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

// Numbers: G, B, N, M, d, kernel, degree, whether Y is there; then coef0 (a double), X, Y, gamma.
void run_kernel_matrix(DType dtype, int64_t size) {
  KernelMatrix a{};
  a.G = number();
  a.B = number();
  a.N = number();
  a.M = number();
  a.d = number();
  a.kernel = Kernel(number());
  a.degree = number();
  const bool has_Y = number() != 0;
  input.read(reinterpret_cast<char*>(&a.coef0), sizeof a.coef0);
  const Array X = Array::read(a.B * a.N * a.d * size), Y = Array::read(has_Y ? a.B * a.M * a.d * size : 0),
              gamma = Array::read(a.G * a.B * size), mean(a.B * a.d * size), values(a.G * a.B * a.N * a.M * size);
  a.X = X.data.get();
  a.Y = has_Y ? Y.data.get() : nullptr;
  a.gamma = gamma.data.get();
  a.mean = mean.data.get();
  a.values = values.data.get();
  kernel_matrix(dtype, a, Stream{});
  values.write();
}

// Numbers: P, N, L, whether there is a K for each problem; then K, codes, root, counts, scale.
void run_class_center(DType dtype, int64_t size) {
  ClassCenter a{};
  a.P = number();
  a.N = number();
  a.L = number();
  a.K_stride = number() != 0 ? a.N * a.N : 0;
  const Array K = Array::read((a.K_stride == 0 ? 1 : a.P) * a.N * a.N * size),
              codes = Array::read(a.P * a.N * int64_t(sizeof(int64_t))), root = Array::read(a.P * a.N * size),
              counts = Array::read(a.P * a.L * size), scale = Array::read(a.P * a.L * size),
              centered(a.P * a.N * a.N * size), means(a.P * a.N * a.L * size);
  a.K = K.data.get();
  a.codes = reinterpret_cast<const int64_t*>(codes.data.get());
  a.root = root.data.get();
  a.counts = counts.data.get();
  a.scale = scale.data.get();
  a.centered = centered.data.get();
  a.means = means.data.get();
  class_center(dtype, a, Stream{});
  centered.write();
  means.write();
}

// Numbers: P, L; then S.
void run_eigh_small(DType dtype, int64_t size) {
  SmallEigh a{};
  a.P = number();
  a.L = number();
  const Array S = Array::read(a.P * a.L * a.L * size), values(a.P * a.L * size), vectors(a.P * a.L * a.L * size);
  a.S = S.data.get();
  a.values = values.data.get();
  a.vectors = vectors.data.get();
  eigh_small(dtype, a, Stream{});
  values.write();
  vectors.write();
}

}  // namespace

int main(int, char** arguments) {
  input.open(arguments[1], std::ios::binary);
  output.open(arguments[2], std::ios::binary);
  void (*const operators[])(DType, int64_t) = {run_kernel_matrix, run_class_center, run_eigh_small};
  while (input.peek() != EOF) {
    const int64_t which = number(), wide = number();
    operators[which](wide ? DType::f64 : DType::f32, wide ? 8 : 4);
  }
  return input.good() || input.eof() ? EXIT_SUCCESS : EXIT_FAILURE;
}
