/* What sparse.py makes of a teacher's logits, on a processor: the top k and draws, row by row while a row is in the
 * cache. In capitals stands what is given when this is compiled (native.py): TEACHER, the logits' type.
 *
 * Both functions return 0 and leave the work to sparse.py where a row is unusual: logits that are not finite, so many
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

/* Places [n] of the values [n] in falling order; of equals the first comes first. */
static void rank(const float *values, int32_t n, int32_t *ranks) {
    for (int32_t i = 0; i < n; i++) {
        float own = values[i];
        int32_t before = 0;
#pragma omp simd reduction(+ : before)
        for (int32_t j = 0; j < n; j++) before += (values[j] > own) | ((values[j] == own) & (j < i));
        ranks[i] = before;
    }
}

/* The log of the sum of exp((z - peak) / T) over all z below `last`, and over `equal` ones that are equal to it. */
static double log_of_rest(const TEACHER *logits, int64_t classes, float last, int64_t equal, float peak, float by_t) {
    float top = -INFINITY; /* the rest may be too small beside the peak, but not beside its own maximum */
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < classes; j++) {
        float z = READ(logits + j);
        top = z < last && z > top ? z : top;
    }
    double rest = 0, of_last = ((double)last - peak) * by_t, of_top = ((double)top - peak) * by_t;
    for (int64_t first = 0; first < classes && top > -INFINITY; first += BLOCK) {
        int64_t end = first + BLOCK < classes ? first + BLOCK : classes;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < end; j++) {
            float z = READ(logits + j), e = exponential(((z < last ? z : top) - top) * by_t);
            sum += z < last ? e : 0.0f;
        }
        rest += sum;
    }
    if (equal) return of_last + log(equal + (rest > 0 ? rest * exp(of_top - of_last) : 0));
    return rest > 0 ? log(rest) + of_top : -INFINITY;
}

/* One row; room: columns + 3 * most floats, most: all members of 2 k + 32 columns. Returns whether it could. */
static int top_k_row(const TEACHER *logits, int64_t classes, int64_t columns, int64_t k, int64_t most, float temperature,
                     int32_t *ids, float *log_probs, float *log_tail, float *room) {
    float *maxima = room, *found = room + columns, low = INFINITY, high = -INFINITY, strange = 0;
    int32_t *places = (int32_t *)(found + most), *ranks = places + most, n = 0, chosen = 0;
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
        if (chosen == 2 * k + 32 && c < columns - 1) return 0;
    }
    for (int32_t i = 0; i < chosen; i++)
        for (int64_t j = ranks[i]; j < classes; j += columns) {
            float z = READ(logits + j);
            found[n] = z, places[n] = (int32_t)j;
            n += z >= least;
        }
    if (n > 4 * k + 64) return 0; /* each will be compared with each */
    rank(found, n, ranks);
    float peak = high, by_t = 1 / temperature, last = -INFINITY, total = 0;
    for (int32_t i = 0; i < n; i++) {
        if (ranks[i] >= k) continue;
        ids[ranks[i]] = places[i], log_probs[ranks[i]] = (found[i] - peak) * by_t;
        if (ranks[i] == k - 1) last = found[i];
    }
    int64_t equal = -k; /* of those that are not below the last one all but k are not kept */
    for (int32_t i = 0; i < n; i++) equal += found[i] >= last;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < k; i++) total += exponential(log_probs[i]);
    double log_rest = log_of_rest(logits, classes, last, equal, peak, by_t), log_total = log(total + exp(log_rest));
    for (int64_t i = 0; i < k; i++) log_probs[i] = (float)(log_probs[i] - log_total);
    *log_tail = (float)(log_rest - log_total);
    return 1;
}

/* logits [rows, classes] -> ids and log_probs [rows, k], log_tail [rows]; room [threads, columns + 3 * most]. */
int top_k(const TEACHER *logits, int64_t rows, int64_t classes, int64_t stride, int64_t columns, int64_t k, int64_t most,
          float temperature, int32_t *ids, float *log_probs, float *log_tail, float *room, int64_t threads) {
    int all = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : all)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads && all; i++)
            all = all && top_k_row(logits + i * stride, classes, columns, k, most, temperature, ids + i * k,
                                   log_probs + i * k, log_tail + i, room + part * (columns + 3 * most));
    return all;
}

/* One row; room: classes + columns floats. Returns whether it could. */
static int draw_row(const TEACHER *logits, int64_t classes, int64_t columns, int64_t n, float temperature,
                    double uniform, int32_t *ids, int32_t *top, float *entropy, float *room) {
    float *es = room, *sums = room + classes, peak = -INFINITY, strange = 0, by_temperature = 1 / temperature;
#pragma omp simd reduction(+ : strange) reduction(max : peak)
    for (int64_t j = 0; j < classes; j++) {
        float z = READ(logits + j);
        strange += z - z;
        peak = peak > z ? peak : z;
    }
    if (strange != 0) return 0;
    for (int64_t c = 0; c < columns; c++) sums[c] = 0;
    double weighted = 0, total = 0;
    int32_t best = 0;
    for (int64_t first = 0; first < classes; first += columns) {
        int64_t last = first + columns < classes ? columns : classes - first;
        float dot = 0;
        int32_t at = -1;
#pragma omp simd reduction(+ : dot) reduction(max : at)
        for (int64_t c = 0; c < last; c++) {
            float z = READ(logits + first + c), x = (z - peak) * by_temperature, e = exponential(x);
            es[first + c] = e;
            sums[c] += e;
            dot += x * e;
            at = z == peak ? (int32_t)c : at;
        }
        if (at >= 0) best = (int32_t)first + at;
        weighted += dot;
    }
    for (int64_t c = 0; c < columns; c++) total += sums[c];
    *entropy = (float)(log(total) - weighted / total);
    *top = best;

    /* The points rise, and so do the column and the id in it that they are under. */
    double below = 0, inner_below = 0, inner_total = 0;
    const double nearly = 1 - 8 * DBL_EPSILON; /* what has no probability lies beyond every point */
    int64_t column = 0, member = -1;
    for (int64_t i = 0; i < n; i++) {
        double point = fmin((i + uniform) / n, nearly) * total;
        while (column < columns - 1 && below + sums[column] <= point) below += sums[column++], member = -1;
        if (member < 0) {
            member = 0, inner_below = inner_total = 0;
            for (int64_t j = column; j < classes; j += columns) inner_total += es[j];
        }
        double share = fmin((point - below) / sums[column], nearly) * inner_total;
        while ((member + 1) * columns + column < classes && inner_below + es[member * columns + column] <= share)
            inner_below += es[member++ * columns + column];
        ids[i] = (int32_t)(member * columns + column);
    }
    return 1;
}

/* logits [rows, classes] -> ids [rows, n], top and entropy [rows]; room [threads, classes + columns]. */
int draw(const TEACHER *logits, int64_t rows, int64_t classes, int64_t stride, int64_t columns, int64_t n,
         float temperature, const double *uniform, int32_t *ids, int32_t *top, float *entropy, float *room, int64_t threads) {
    int all = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : all)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads && all; i++)
            all = all && draw_row(logits + i * stride, classes, columns, n, temperature, uniform[i], ids + i * n,
                                  top + i, entropy + i, room + part * (classes + columns));
    return all;
}
