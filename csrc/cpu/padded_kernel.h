// The last columns of a row, fewer than a group: copies padded with zeros. For the <kernel>_kernel.h
// of several kernels, inside their unnamed namespace, hence no include guard and no includes.

template <class T>
struct Padded {
  T elements[Simd::kGroup] = {};

  Padded() = default;
  Padded(const T* from, int64_t count) { std::memcpy(elements, from, count * sizeof(T)); }
  void copy_to(T* to, int64_t count) const { std::memcpy(to, elements, count * sizeof(T)); }
};
