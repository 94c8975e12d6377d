/* What sparse.py makes of a teacher's logits, on a processor: the top k and draws, row by row while a row is in the
 * cache; and their ids in the fewest bits. In capitals stands what is given when this is compiled (native.py): TEACHER,
 * the logits' type.
 *
 * They return 0 and leave the work to sparse.py where a row is unusual: logits that are not finite, so many equal ones
 * that the k largest are none in particular.
 */
#include <float.h>
#ifdef __AVX512F__
#include <immintrin.h>
#define FEW 8 /* members of a column, up to which it is faster to look at all logits */
#else
#define FEW 1
#endif

#include "native.h"

/* The bits of |z|; those of what is not finite are not less than those of infinity. */
static inline int32_t size_of(float z) { return (int32_t)(float_as_bits(z) & 0x7fffffff); }
#define BITS_OF_INFINITY 0x7f800000

/* An integer that is larger where z is, and back: a maximum of integers takes one cycle, of floats four. */
static inline int32_t level_of(float z) {
    int32_t bits = (int32_t)float_as_bits(z);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
static inline float of_level(int32_t level) { return bits_as_float((uint32_t)(level ^ ((level >> 31) & 0x7fffffff))); }

/* A temperature: 1 / T, and for `power` log2(e) / T and the least x. */
typedef struct { float by_t, factor, lowest; } scale;
static inline scale scale_of(float temperature) {
    float factor = 1.44269504f / temperature;
    return (scale){1 / temperature, factor, -125 / factor};
}

/* exp(x / T) for x <= 0, to 3e-7 down to 2^-125; there it stays. Half the work of `exponential`, and for what is finite
 * alone: 2^f on [-1/2, 1/2] by a polynomial of least relative error; a sum with 1.5 * 2^23 ends in the whole number. */
static inline float power(float x, scale by) {
    x = x > by.lowest ? x : by.lowest;
    float shifted = x * by.factor + 12582912.0f, f = x * by.factor - (shifted - 12582912.0f), p = 1.326472731e-3f;
    p = p * f + 9.671512991e-3f;
    p = p * f + 5.550733581e-2f;
    p = p * f + 2.402224243e-1f;
    p = p * f + 6.931470037e-1f;
    p = p * f + 1.0f;
    return bits_as_float(float_as_bits(p) + (float_as_bits(shifted) << 23));
}

/* ids [k] -> out, little endian, `bits` each; 8, 16, 32 and 64 bits as such integers. */
static void write_ids(const int64_t *ids, int64_t k, int64_t bits, void *out) {
    if (bits == 64) memcpy(out, ids, k * sizeof *ids);
    else if (bits == 32)
        for (int64_t j = 0; j < k; j++) ((uint32_t *)out)[j] = (uint32_t)ids[j];
    else if (bits == 16)
        for (int64_t j = 0; j < k; j++) ((uint16_t *)out)[j] = (uint16_t)ids[j];
    else {
        uint8_t *next = out;
        uint64_t held = 0; /* bits that fill no byte yet */
        int64_t filled = 0;
        for (int64_t j = 0; j < k; j++) {
            held |= (uint64_t)ids[j] << filled;
            if ((filled += bits) < 32) continue;
            next[0] = (uint8_t)held, next[1] = (uint8_t)(held >> 8), next[2] = (uint8_t)(held >> 16);
            next[3] = (uint8_t)(held >> 24), next += 4, held >>= 32, filled -= 32;
        }
        for (; filled > 0; filled -= 8, held >>= 8) *next++ = (uint8_t)held;
    }
}

/* values [n], the largest first -> out + at, of 32, 16 or 8 bits; in 8 they are steps from the last, 0, to the first,
 * 255, both of which go as float16 to `ends`. */
static void write_values(const float *values, int64_t n, int64_t bits, void *out, int64_t at, float16 *ends) {
    if (bits == 32) memcpy((float *)out + at, values, n * sizeof *values);
    else if (bits == 16) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) write_float16((float16 *)out + at + j, values[j]);
    } else {
        write_float16(ends, values[0]), write_float16(ends + 1, values[n - 1]);
        float low = read_float16(ends + 1), step = (read_float16(ends) - low) / 255;
        step = step > 1e-12f ? step : 1e-12f;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            float code = rintf((values[j] - low) / step);
            ((uint8_t *)out)[at + j] = (uint8_t)(int32_t)(code < 0 ? 0 : code > 255 ? 255 : code);
        }
    }
}

/* What at least k of n values [n] reach, and not many more: `low` is reached by all. */
static float reached_by(const float *values, int64_t n, int64_t k, float low, float high) {
    for (int i = 0; i < 24; i++) {
        float middle = 0.5f * low + 0.5f * high;
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t j = 0; j < n; j++) count += values[j] >= middle;
        if (count >= k) low = middle;
        else high = middle;
        if (count >= k && count <= k + k / 8) break;
    }
    return low;
}

/* The values [n] and their places in order, the largest first, of equals the first; none is below `least` or above
 * `high`. Each is compared with each, as one of 65,535 steps: whatever shares a step is put in order afterwards. Room:
 * n + 95 of keys and ranks each, n of the rest. */
static void in_order(const float *values, const int32_t *places, int32_t n, float least, float high, float *sorted,
                     int32_t *sorted_places, int16_t *keys, int16_t *ranks) {
    const float half = 0.5f * high - 0.5f * least, steps = half > 1e-30f ? 65534 / half : 0;
    int32_t mixed = 0;
#pragma omp simd
    for (int32_t i = 0; i < n; i++) {
        keys[i] = (int16_t)((int32_t)((0.5f * values[i] - 0.5f * least) * steps) - 32767);
        sorted_places[i] = -1;
    }
    for (int32_t first = 0; first < n; first += 96) { /* no rest, which would take longer than the whole */
        int16_t above[96] = {0}; /* stays in a register */
        for (int32_t j = 0; j < n; j++) {
            int16_t other = keys[j];
#pragma omp simd
            for (int32_t i = 0; i < 96; i++) above[i] = other > keys[first + i] ? above[i] + 1 : above[i];
        }
        memcpy(ranks + first, above, sizeof above);
    }
    for (int32_t i = 0; i < n; i++) {
        int32_t at = ranks[i];
        while (sorted_places[at] >= 0) at++;
        sorted_places[at] = places[i], sorted[at] = values[i];
    }
#pragma omp simd reduction(| : mixed)
    for (int32_t i = 1; i < n; i++) mixed |= sorted[i] > sorted[i - 1];
    for (int32_t i = 1; mixed && i < n; i++) {
        float value = sorted[i];
        int32_t place = sorted_places[i], at = i;
        for (; at > 0 && value > sorted[at - 1]; at--)
            sorted[at] = sorted[at - 1], sorted_places[at] = sorted_places[at - 1];
        sorted[at] = value, sorted_places[at] = place;
    }
}

/* The sum of exp((z - reference) / T) over all z below `last`, none of which exceeds `reference`. */
static double sum_below(const TEACHER *logits, int64_t classes, float last, float reference, scale by) {
    double total = 0;
    for (int64_t first = 0; first < classes; first += BLOCK) {
        int64_t end = first + BLOCK < classes ? first + BLOCK : classes;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < end; j++) {
            float z = READ(logits + j), e = power((z < last ? z : reference) - reference, by);
            sum += z < last ? e : 0.0f;
        }
        total += sum;
    }
    return total;
}

/* The log of the sum of exp((z - peak) / T) over all z below `last`, and over `equal` ones that are equal to it; found
 * [n]: the ones that reach `least`; below: the sum of exp((z - least) / T) over the others. */
static double log_of_rest(const TEACHER *logits, int64_t classes, const float *found, int32_t n, float least,
                          double below, float last, int64_t equal, float peak, scale by) {
    double of_last = ((double)last - peak) * by.by_t, rest;
    float between = 0, top = -INFINITY;
#pragma omp simd reduction(+ : between)
    for (int32_t i = 0; i < n; i++) {
        float x = (found[i] < last ? found[i] : last) - last, e = power(x, by);
        between += found[i] < last ? e : 0.0f;
    }
    rest = below * power(least - last, by) + between;
    if (rest > 1e-20 || equal) return of_last + log(equal + rest);
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < classes; j++) { /* too small beside the last one, but not beside its own maximum */
        float z = READ(logits + j);
        top = z < last && z > top ? z : top;
    }
    if (top == -INFINITY) return -INFINITY;
    return log(sum_below(logits, classes, last, top, by)) + ((double)top - peak) * by.by_t;
}

/* The logits that reach `least`, with their places, in order: all are looked at, until they are more than `most`; room:
 * most + 32 each. Returns how many; below: the sum of exp((z - least) / T) over the others. `next`: the next row. */
static int32_t reaching(const TEACHER *logits, const TEACHER *next, int64_t classes, float least, int64_t most,
                        float *found, int32_t *places, scale by, double *below) {
    int32_t n = 0;
    int64_t first = 0;
    *below = 0;
#ifdef __AVX512F__
    const __m512i ahead = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    while (first + 16 <= classes && n <= most) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t end = first + BLOCK; first < end && first + 16 <= classes && n <= most; first += 16) {
            __builtin_prefetch(next + first);
            float z[16], e[16];
            for (int i = 0; i < 16; i++) z[i] = READ(logits + first + i), e[i] = power(z[i] - least, by);
            __m512 values = _mm512_loadu_ps(z);
            __m512i own = _mm512_add_epi32(ahead, _mm512_set1_epi32((int32_t)first));
            __mmask16 reach = _mm512_cmp_ps_mask(values, _mm512_set1_ps(least), _CMP_GE_OQ);
            _mm512_storeu_ps(found + n, _mm512_maskz_compress_ps(reach, values));
            _mm512_storeu_si512(places + n, _mm512_maskz_compress_epi32(reach, own));
            n += __builtin_popcount(reach);
            sum = _mm512_mask_add_ps(sum, ~reach, sum, _mm512_loadu_ps(e));
        }
        *below += _mm512_reduce_add_ps(sum);
    }
#endif
    *below += sum_below(logits + first, classes - first, least, least, by);
    for (; first < classes && n <= most; first++) {
        found[n] = READ(logits + first), places[n] = (int32_t)first;
        n += found[n] >= least;
    }
    return n;
}

/* One row; room: columns + 5 * most floats, most: all members of 2 k + 32 columns and 4 k + 160, and not less than
 * columns. Returns whether it could. `next`: the next row, which is on its way into the cache meanwhile. */
static int top_k_row(const TEACHER *logits, const TEACHER *next, int64_t classes, int64_t columns, int64_t k,
                     int64_t most, float temperature, int64_t *ids, float *log_probs, float *log_tail, float *room) {
    float *maxima = room, *found = room + columns, *sorted = found + most, low = INFINITY, high = -INFINITY;
    int32_t *places = (int32_t *)(sorted + most), *ranks = places + most, *sorted_places = ranks + most;
    int32_t n = 0, chosen = 0, largest = 0;
    const scale by = scale_of(temperature);
    double below;
    for (int64_t c = 0; c < columns; c++) maxima[c] = -INFINITY;
    for (int64_t first = 0; first < classes; first += columns) {
        int64_t last = first + columns < classes ? columns : classes - first;
#pragma omp simd reduction(max : largest)
        for (int64_t c = 0; c < last; c++) {
            float z = READ(logits + first + c);
            largest = largest > size_of(z) ? largest : size_of(z);
            maxima[c] = maxima[c] > z ? maxima[c] : z;
        }
    }
    if (largest >= BITS_OF_INFINITY) return 0;
#pragma omp simd reduction(max : high) reduction(min : low)
    for (int64_t c = 0; c < columns; c++) {
        high = high > maxima[c] ? high : maxima[c];
        low = low < maxima[c] ? low : maxima[c];
    }

    /* The maxima of k columns reach `least`, and so the k largest logits do. */
    float least = reached_by(maxima, columns, k, low, high);
    if (classes <= FEW * columns) n = reaching(logits, next, classes, least, 4 * k + 64, found, places, by, &below);
    else {
        for (int64_t c = 0; c < columns; c++) { /* without a branch, which could not be foreseen */
            ranks[chosen] = (int32_t)c;
            chosen += maxima[c] >= least;
        }
        if (chosen > 2 * k + 32) return 0;
        for (int32_t i = 0; i < chosen; i++)
            for (int64_t j = ranks[i]; j < classes; j += columns) {
                float z = READ(logits + j);
                found[n] = z, places[n] = (int32_t)j;
                n += z >= least;
            }
        below = sum_below(logits, classes, least, least, by);
    }
    if (n > 4 * k + 64) return 0; /* each will be compared with each */
    in_order(found, places, n, least, high, sorted, sorted_places, (int16_t *)ranks, (int16_t *)ranks + most);
    float peak = high, last = sorted[k - 1], total = 0;
    int64_t equal = -k; /* of those that are not below the last one all but k are not kept */
#pragma omp simd reduction(+ : equal)
    for (int32_t i = 0; i < n; i++) equal += found[i] >= last;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < k; i++) {
        ids[i] = sorted_places[i], log_probs[i] = (sorted[i] - peak) * by.by_t;
        total += power(sorted[i] - peak, by);
    }
    double log_rest = log_of_rest(logits, classes, found, n, least, below, last, equal, peak, by);
    double log_total = log(total + exp(log_rest));
    for (int64_t i = 0; i < k; i++) log_probs[i] = (float)(log_probs[i] - log_total);
    *log_tail = (float)(log_rest - log_total);
    return 1;
}

/* logits [rows, classes] -> ids [rows, bytes] of `bits` each, log_probs [rows, k] of `value_bits` (8: with their ends
 * [rows, 2]) and log_tail [rows], float or float16; room [threads, size]: of each a row of ids and of log_probs comes
 * first. */
int top_k(const TEACHER *logits, int64_t rows, int64_t classes, int64_t stride, int64_t columns, int64_t k,
          int64_t most, float temperature, int64_t bits, int64_t bytes, uint8_t *ids, int64_t value_bits,
          void *log_probs, float16 *ends, void *log_tail, double *room, int64_t size, int64_t threads) {
    int all = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : all)
    for (int64_t part = 0; part < threads; part++) {
        int64_t *found = (int64_t *)(room + part * size);
        float *values = (float *)(found + k), *rest = values + k, tail;
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; i++) {
            const TEACHER *row = logits + i * stride, *next = i + 1 < rows ? row + stride : row;
            all = all && top_k_row(row, next, classes, columns, k, most, temperature, found, values, &tail, rest);
            if (!all) break;
            write_ids(found, k, bits, ids + i * bytes);
            write_values(values, k, value_bits, log_probs, i * k, ends + 2 * i);
            write_values(&tail, 1, value_bits == 32 ? 32 : 16, log_tail, i, NULL);
        }
    }
    return all;
}

/* One row; room: (rows + 1) * columns and 3 n floats, columns + 1 and n doubles, with rows = classes / columns, rounded
 * up, and at least 16 columns. Returns whether it could. */
static int draw_row(const TEACHER *logits, const TEACHER *next, int64_t classes, int64_t columns, int64_t n,
                    float temperature, double uniform, int64_t *ids, int64_t *top, float *entropy, double *room) {
    const int64_t rows = (classes + columns - 1) / columns, last = (rows - 1) * columns;
    double *sums = room, *points = sums + columns + 1, weighted = 0, total = 0;
    float *es = (float *)(points + n), *shares = es + (rows + 1) * columns, peak;
    const scale by = scale_of(temperature);
    int32_t *chosen = (int32_t *)(shares + n), *members = chosen + n, best = -1, largest = 0, highest = INT32_MIN;
#pragma omp simd reduction(max : highest, largest)
    for (int64_t j = 0; j < classes; j++) {
        float z = READ(logits + j);
        largest = largest > size_of(z) ? largest : size_of(z);
        highest = highest > level_of(z) ? highest : level_of(z);
    }
    if (largest >= BITS_OF_INFINITY) return 0;
    peak = of_level(highest);

    /* es: what the members of a column sum up to, one after the other, after a row of zeros; and then the columns. */
    for (int64_t c = 0; c < columns; c++) es[c] = 0;
    for (int64_t first = 0; first < classes; first += BLOCK) {
        int64_t end = first + BLOCK < classes ? first + BLOCK : classes;
        float dot = 0;
#pragma omp simd safelen(16) reduction(+ : dot) reduction(max : best)
        for (int64_t j = first; j < end; j++) {
            float z = READ(logits + j), x = z - peak > by.lowest ? z - peak : by.lowest, e = power(x, by);
            es[j + columns] = es[j] + e;
            dot += x * e;
            best = z == peak ? (int32_t)j : best;
        }
        weighted += dot;
    }
    es += columns;
    for (int64_t j = classes; j < rows * columns; j++) es[j] = es[j - columns]; /* under no point */
    sums[0] = 0;
    for (int64_t c = 0; c < columns; c++) {
        sums[c + 1] = total += es[last + c];
        for (int64_t j = 0; j < rows; j += 16) __builtin_prefetch(next + c * rows + j);
    }
    *entropy = (float)(log(total) - weighted / total / temperature);
    *top = best;

    /* Evenly spaced points. What has no probability (`power` says 2e-38) lies below or above all of them. */
    const double step = total / n, nearly = (1 - 8 * DBL_EPSILON) * total;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        double point = (i + uniform) * step;
        point = point > 1e-30 ? point : 1e-30;
        points[i] = point < nearly ? point : nearly;
        chosen[i] = members[i] = 0;
    }
    /* Where each lies: the column under it, then the member. All at once, half by half. */
    for (int64_t left = columns, half; left > 1; left -= half) {
        half = left / 2;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) chosen[i] += sums[chosen[i] + half] <= points[i] ? (int32_t)half : 0;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float share = (float)(points[i] - sums[chosen[i]]);
        float most = (1 - FLT_EPSILON) * es[last + chosen[i]];
        share = share > 1e-30f ? share : 1e-30f;
        shares[i] = share < most ? share : most;
    }
    for (int64_t left = rows, half; left > 1; left -= half) {
        half = left / 2;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            members[i] += es[chosen[i] + (members[i] + half - 1) * columns] <= shares[i] ? (int32_t)half : 0;
    }
    for (int64_t i = 0; i < n; i++) ids[i] = chosen[i] + members[i] * columns;
    return 1;
}

/* logits [rows, classes] -> ids [rows, bytes] and top [rows, top_bytes] of `bits` each, entropy [rows]; room
 * [threads, size]: of each a row of ids comes first. */
int draw(const TEACHER *logits, int64_t rows, int64_t classes, int64_t stride, int64_t columns, int64_t n,
         float temperature, const double *uniform, int64_t bits, int64_t bytes, uint8_t *ids, int64_t top_bytes,
         uint8_t *top, float *entropy, double *room, int64_t size, int64_t threads) {
    int all = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : all)
    for (int64_t part = 0; part < threads; part++) {
        int64_t *found = (int64_t *)(room + part * size), best;
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; i++) {
            const TEACHER *row = logits + i * stride, *next = i + 1 < rows ? row + stride : row;
            all = all && draw_row(row, next, classes, columns, n, temperature, uniform[i], found, &best, entropy + i,
                                  (double *)(found + n));
            if (!all) break;
            write_ids(found, n, bits, ids + i * bytes);
            write_ids(&best, 1, bits, top + i * top_bytes);
        }
    }
    return all;
}
