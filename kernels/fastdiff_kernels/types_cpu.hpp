// How the CPU's loops read and write a block of fp32, bf16 or fp16: fp32 in between.

#include <cstdint>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace {

enum Type { FP32, BF16, FP16 };

template <class T>
const float* widened(const void* from, int64_t at, int count, float* to) {
  const T* given = static_cast<const T*>(from) + at;
  for (int i = 0; i < count; i++) to[i] = static_cast<float>(given[i]);
  return to;
}

const float* read(const void* from, int type, int64_t at, int count, float* to) {
  if (type == BF16) return widened<c10::BFloat16>(from, at, count, to);
  if (type == FP16) return widened<c10::Half>(from, at, count, to);
  return static_cast<const float*>(from) + at;
}

template <class T>
void scaled(const float* from, float c, void* out, int64_t at, int count) {
  T* to = static_cast<T*>(out) + at;
  for (int i = 0; i < count; i++) to[i] = static_cast<T>(c * from[i]);
}

void write(const float* from, float c, void* out, int type, int64_t at, int count) {
  if (type == BF16) return scaled<c10::BFloat16>(from, c, out, at, count);
  if (type == FP16) return scaled<c10::Half>(from, c, out, at, count);
  scaled<float>(from, c, out, at, count);
}

// a chain's table of coefficients, or one made for the call: what fastdiff.native.Rows declares
struct Rows {
  const float* table;
  const int64_t* t;  // a row of the table; null: row b is sample b's
  int64_t each;      // 0: all samples take the first

  const float* of(int64_t b, int width) const { return table + width * (t ? t[each * b] : each * b); }
};

}  // namespace
