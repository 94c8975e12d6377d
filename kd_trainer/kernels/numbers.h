/* Numbers of a processor: types that are read and written, exponentials and logarithms that a compiler can put into
 * vectors. What is in capitals in the files that include this is given when they are compiled (c_compiler.py).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 2048 /* columns that are summed in float32, before float64 takes over */

typedef struct { uint16_t bits; } bfloat16;

static inline float bits_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float read_float(const float *x) { return *x; }
static inline float read_bfloat16(const bfloat16 *x) { return bits_as_float((uint32_t)x->bits << 16); }
static inline void write_float(float *out, float x) { *out = x; }
static inline void write_bfloat16(bfloat16 *out, float x) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits = float_as_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out->bits = (uint16_t)(x == x ? rounded : 0x7fc0);
}
#define READ(x) _Generic(*(x), float: read_float, bfloat16: read_bfloat16)((const void *)(x))
#define WRITE(out, x) _Generic(*(out), float: write_float, bfloat16: write_bfloat16)((void *)(out), x)

/* exp(x) for x <= 0, to one unit in the last place down to 1e-38, then 0: as large as x may be, 0 times x is 0. Cephes'
 * polynomial. */
static inline float exponential(float x) {
    float above = -87.0f > x ? -87.0f : x; /* written so, NaN stays NaN */
    float n = rintf(above * 1.44269504f), r = above - n * 0.693359375f - n * -2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return x < -87.0f ? 0.0f : bits_as_float(float_as_bits(p) + ((uint32_t)(int32_t)n << 23)); /* p * 2^n */
}

/* log(x) for x >= 1e-38; NaN stays NaN. Cephes' polynomial. */
static inline float logarithm(float x) {
    uint32_t bits = float_as_bits(x);
    float n = (float)((int32_t)(bits >> 23) - 126), m = bits_as_float((bits & 0x007fffff) | 0x3f000000); /* 0.5 to 1 */
    int low = m < 0.707106781186547524f;
    n = low ? n - 1.0f : n;
    m = (low ? m + m : m) - 1.0f;
    float z = m * m, p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z + n * -2.12194440e-4f - 0.5f * z;
    return m + p + n * 0.693359375f + (x - x);
}
