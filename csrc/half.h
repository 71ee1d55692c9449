// float16 and bfloat16 as stored in memory, with exact conversion to float and rounding to nearest
// even back.
#pragma once

#include <cstdint>
#include <cstring>

namespace vqfast {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return bits_float(sign | 0x7F800000u | (rest & 0x3FF) << 13);  // infinity, NaN
  // the exponent of a subnormal comes out right by multiplying in float
  const float scaled = bits_float(rest << 13) * 0x1p112f;
  return bits_float(sign | float_bits(scaled));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  if (x != x) return {static_cast<uint16_t>(u >> 16 | 0x40)};
  return {static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000;
  const uint32_t rest = u & 0x7FFFFFFF;
  if (rest > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};   // NaN
  if (rest >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // rounds to infinity
  if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    return {static_cast<uint16_t>(sign | (float_bits(bits_float(rest) + 0.5f) - 0x3F000000u))};
  }
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xFFF + (rest >> 13 & 1)) >> 13))};
}

}  // namespace vqfast
