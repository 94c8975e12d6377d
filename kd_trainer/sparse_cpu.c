/* What sparse.py makes of a teacher's logits, on a processor: the top k and draws, row by row while a row is in the
 * cache; and their ids in the fewest bits. In capitals stands what is given when this is compiled (native.py): TEACHER,
 * the logits' type.
 *
 * The first two return 0 and leave the work to sparse.py where a row is unusual: logits that are not finite, so many
 * equal ones that the k largest are none in particular.
 */
#include <float.h>

#include "native.h"

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

/* How many of the values [n] are above each; `values` and `ranks` have room up to a whole 16. */
static void rank(float *values, int32_t n, int32_t *ranks) {
    int32_t end = (n + 15) / 16 * 16; /* no rest, which would take longer than the whole */
    for (int32_t i = n; i < end; i++) values[i] = -INFINITY;
    for (int32_t i = 0; i < end; i++) ranks[i] = 0;
    for (int32_t j = 0; j < n; j++) {
        float other = values[j];
#pragma omp simd
        for (int32_t i = 0; i < end; i++) ranks[i] += other > values[i];
    }
}

/* The sum of exp((z - reference) / T) over all z below `last`, none of which exceeds `reference`. */
static double sum_below(const TEACHER *logits, int64_t classes, float last, float reference, float by_t) {
    double total = 0;
    for (int64_t first = 0; first < classes; first += BLOCK) {
        int64_t end = first + BLOCK < classes ? first + BLOCK : classes;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < end; j++) {
            float z = READ(logits + j), e = exponential(((z < last ? z : reference) - reference) * by_t);
            sum += z < last ? e : 0.0f;
        }
        total += sum;
    }
    return total;
}

/* The log of the sum of exp((z - peak) / T) over all z below `last`, and over `equal` ones that are equal to it. */
static double log_of_rest(const TEACHER *logits, int64_t classes, float last, int64_t equal, float peak, float by_t) {
    double below = sum_below(logits, classes, last, last, by_t), of_last = ((double)last - peak) * by_t;
    if (below > 1e-20 || equal) return of_last + log(equal + below);
    float top = -INFINITY; /* too small beside the last one, but not beside its own maximum */
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < classes; j++) {
        float z = READ(logits + j);
        top = z < last && z > top ? z : top;
    }
    if (top == -INFINITY) return -INFINITY;
    return log(sum_below(logits, classes, last, top, by_t)) + ((double)top - peak) * by_t;
}

/* One row; room: columns + 5 * most floats, most: all members of 2 k + 32 columns and 16, and not less than columns.
 * Returns whether it could. */
static int top_k_row(const TEACHER *logits, int64_t classes, int64_t columns, int64_t k, int64_t most, float temperature,
                     int64_t *ids, float *log_probs, float *log_tail, float *room) {
    float *maxima = room, *found = room + columns, *sorted = found + most, low = INFINITY, high = -INFINITY, strange = 0;
    int32_t *places = (int32_t *)(sorted + most), *ranks = places + most, *in_order = ranks + most, n = 0, chosen = 0;
    for (int64_t c = 0; c < columns; c++) maxima[c] = -INFINITY;
    for (int64_t first = 0; first < classes; first += columns) {
        int64_t last = first + columns < classes ? columns : classes - first;
#pragma omp simd reduction(+ : strange)
        for (int64_t c = 0; c < last; c++) {
            float z = READ(logits + first + c);
            strange += z - z; /* NaN where z is not finite */
            maxima[c] = maxima[c] > z ? maxima[c] : z;
        }
    }
    if (strange != 0) return 0;
#pragma omp simd reduction(max : high) reduction(min : low)
    for (int64_t c = 0; c < columns; c++) {
        high = high > maxima[c] ? high : maxima[c];
        low = low < maxima[c] ? low : maxima[c];
    }

    /* The maxima of k columns reach `least`, and so the k largest logits do. */
    float least = reached_by(maxima, columns, k, low, high);
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
    if (n > 4 * k + 64) return 0; /* each will be compared with each */
    rank(found, n, ranks);
    for (int32_t i = 0; i < n; i++) in_order[i] = -1;
    for (int32_t i = 0; i < n; i++) {
        int32_t at = ranks[i];
        while (in_order[at] >= 0) at++; /* of equals the first comes first */
        in_order[at] = places[i], sorted[at] = found[i];
    }
    float peak = high, by_t = 1 / temperature, last = sorted[k - 1], total = 0;
    int64_t equal = -k; /* of those that are not below the last one all but k are not kept */
#pragma omp simd reduction(+ : equal)
    for (int32_t i = 0; i < n; i++) equal += found[i] >= last;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < k; i++) {
        ids[i] = in_order[i], log_probs[i] = (sorted[i] - peak) * by_t;
        total += exponential(log_probs[i]);
    }
    double log_rest = log_of_rest(logits, classes, last, equal, peak, by_t), log_total = log(total + exp(log_rest));
    for (int64_t i = 0; i < k; i++) log_probs[i] = (float)(log_probs[i] - log_total);
    *log_tail = (float)(log_rest - log_total);
    return 1;
}

/* logits [rows, classes] -> ids and log_probs [rows, k], log_tail [rows]; room [threads, columns + 5 * most]. */
int top_k(const TEACHER *logits, int64_t rows, int64_t classes, int64_t stride, int64_t columns, int64_t k, int64_t most,
          float temperature, int64_t *ids, float *log_probs, float *log_tail, float *room, int64_t threads) {
    int all = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : all)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads && all; i++)
            all = all && top_k_row(logits + i * stride, classes, columns, k, most, temperature, ids + i * k,
                                   log_probs + i * k, log_tail + i, room + part * (columns + 5 * most));
    return all;
}

/* One row; room: columns + classes / 2 + 1. Returns whether it could. */
static int draw_row(const TEACHER *logits, int64_t classes, int64_t columns, int64_t n, float temperature,
                    double uniform, int64_t *ids, int64_t *top, float *entropy, double *room) {
    double *sums = room, weighted = 0, total = 0;
    float *es = (float *)(room + columns), peak = -INFINITY, strange = 0, by_temperature = 1 / temperature;
#pragma omp simd reduction(+ : strange) reduction(max : peak)
    for (int64_t j = 0; j < classes; j++) {
        float z = READ(logits + j);
        strange += z - z;
        peak = peak > z ? peak : z;
    }
    if (strange != 0) return 0;
    int32_t best = -1;
    for (int64_t first = 0; first < classes; first += BLOCK) {
        int64_t end = first + BLOCK < classes ? first + BLOCK : classes;
        float dot = 0;
#pragma omp simd reduction(+ : dot) reduction(max : best)
        for (int64_t j = first; j < end; j++) {
            float z = READ(logits + j), x = (z - peak) * by_temperature, e = exponential(x);
            es[j] = e;
            dot += x * e;
            best = z == peak ? (int32_t)j : best;
        }
        weighted += dot;
    }
    for (int64_t c = 0; c < columns; c++) sums[c] = 0;
    for (int64_t first = 0; first < classes; first += columns) {
        int64_t last = first + columns < classes ? columns : classes - first;
        for (int64_t c = 0; c < last; c++) sums[c] += es[first + c];
    }
    for (int64_t c = 0; c < columns; c++) total += sums[c];
    *entropy = (float)(log(total) - weighted / total);
    *top = best;

    /* The points rise, and so do the column and the id in it that they are under. */
    const double nearly = 1 - 8 * DBL_EPSILON; /* what has no probability lies beyond every point */
    double below = 0, inner_below = 0;
    int64_t column = 0, id = 0;
    for (int64_t i = 0; i < n; i++) {
        double point = (i + uniform) / n;
        point = (point < nearly ? point : nearly) * total;
        while (column < columns - 1 && below + sums[column] <= point)
            below += sums[column], id = ++column, inner_below = 0;
        double share = point - below, most = nearly * sums[column];
        share = share < most ? share : most;
        while (id + columns < classes && inner_below + es[id] <= share) inner_below += es[id], id += columns;
        ids[i] = id;
    }
    return 1;
}

/* logits [rows, classes] -> ids [rows, n], top and entropy [rows]; room [threads, columns + classes / 2 + 1]. */
int draw(const TEACHER *logits, int64_t rows, int64_t classes, int64_t stride, int64_t columns, int64_t n,
         float temperature, const double *uniform, int64_t *ids, int64_t *top, float *entropy, double *room,
         int64_t threads) {
    int all = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : all)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads && all; i++)
            all = all && draw_row(logits + i * stride, classes, columns, n, temperature, uniform[i], ids + i * n,
                                  top + i, entropy + i, room + part * (columns + classes / 2 + 1));
    return all;
}

/* ids [rows, k] -> packed [rows, bytes], little endian, `bits` each, at most 32. */
int pack(const int64_t *ids, int64_t rows, int64_t k, int64_t bits, int64_t bytes, uint8_t *packed) {
    for (int64_t i = 0; i < rows; i++) {
        uint8_t *out = packed + i * bytes;
        uint64_t held = 0; /* bits that fill no byte yet */
        int64_t filled = 0;
        for (int64_t j = 0; j < k; j++) {
            held |= (uint64_t)ids[i * k + j] << filled;
            if ((filled += bits) < 32) continue;
            out[0] = (uint8_t)held, out[1] = (uint8_t)(held >> 8), out[2] = (uint8_t)(held >> 16);
            out[3] = (uint8_t)(held >> 24), out += 4, held >>= 32, filled -= 32;
        }
        for (; filled > 0; filled -= 8, held >>= 8) *out++ = (uint8_t)held;
    }
    return 1;
}
