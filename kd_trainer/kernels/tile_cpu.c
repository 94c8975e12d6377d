/* The tile of losses/tile.py on a processor: row by row, two exponentials a pair of logits.
 *
 * Plain loops that a compiler turns into vectors: with the exponential written out nothing is called in them, and sums
 * go on in all lanes at once. A row and its exponentials stay in the processor's cache. What is in capitals is given
 * when this is compiled (c_compiler.py); the tests hold the numbers to those of losses/tile.py.
 * s, t: logits of student and teacher over T less their row's maximum; es, et: their exponentials; zs, zt: the row sums
 * of these; q = es/zs, p = et/zt.
 */
#include "numbers.h"

enum { forward_kl, reverse_kl, symmetric_kl, jsd, skew_forward_kl, skew_reverse_kl, total_variation };

#define IS_KL (DIVERGENCE <= symmetric_kl)

/* exp(T s): a power of es where 2T is a small whole number (HALVES), else another exponential. */
static inline float power_of(float es, float s, float temperature) {
    if (HALVES == 0) return exponential(temperature * s);
    float power = HALVES % 2 ? sqrtf(es) : 1.0f;
    for (int i = 0; i < HALVES / 2; i++) power *= es;
    return power;
}

/* The terms of a divergence to a mixture at one class: returns the term of its value; h = dD/dlog q where log q is taken
 * as free, so that dD/ds = h - q * sum(h). s and t stand for log q and log p: what they lack, log zs and log zt, is a
 * constant of the row that falls out of the gradient, and is added to the value afterwards. */
static inline float mixture_terms(float s, float t, float q, float p, float beta, float *h) {
    const float tiny = 1.17549435e-38f;
    if (DIVERGENCE == total_variation) {
        float d = 0.5f * (q - p);
        *h = 0.5f * q * (d > 0 ? 1.0f : d < 0 ? -1.0f : d);
        return fabsf(d);
    }
    float of_q = DIVERGENCE == skew_reverse_kl ? beta : 1.0f - beta, m = (1.0f - of_q) * p + of_q * q;
    m = m < tiny ? tiny : m;
    if (DIVERGENCE == jsd) {
        float log_m = logarithm(m);
        *h = of_q * q * (s - log_m);
        return p * (t - log_m);
    }
    float one = DIVERGENCE == skew_forward_kl ? p : q, share = one / m;
    float log_share = logarithm(share < tiny ? tiny : share);
    *h = q * (DIVERGENCE == skew_forward_kl ? -of_q * share : 1.0f - of_q * share + log_share);
    return one * log_share;
}

/* The sums of a row; a mixture's terms go where a KL has forward and reverse. */
typedef struct { double zs, zt, zh, forward, reverse; float top_s, top_t, same; } sums;

/* es and et are left in `room` [2, columns]. */
static sums sum_row(const STUDENT *student, const TEACHER *teacher, int64_t columns, float temperature, float *room) {
    float top_s = -INFINITY, top_t = -INFINITY;
#pragma omp simd reduction(max : top_s, top_t)
    for (int64_t j = 0; j < columns; j++) {
        float s = READ(student + j), t = READ(teacher + j);
        top_s = top_s > s ? top_s : s;
        top_t = top_t > t ? top_t : t;
    }
    sums x = {0, 0, 0, 0, 0, top_s, top_t, -INFINITY};
    for (int64_t first = 0; first < columns; first += BLOCK) {
        int64_t last = first + BLOCK < columns ? first + BLOCK : columns;
        float same = x.same, zs = 0, zt = 0, zh = 0, forward = 0, reverse = 0;
#pragma omp simd reduction(+ : zs, zt, zh, forward, reverse) reduction(max : same)
        for (int64_t j = first; j < last; j++) {
            float s = READ(student + j) - top_s, t = READ(teacher + j) - top_t;
            float es = exponential(s), et = exponential(t);
            same = same > s + t ? same : s + t;
            zs += es;
            zt += et;
            if (HARD) zh += power_of(es, s, temperature);
            if (IS_KL && DIVERGENCE != reverse_kl) forward += et * (s - t);
            if (IS_KL && DIVERGENCE != forward_kl) reverse += es * (s - t);
            room[j] = es, room[columns + j] = et;
        }
        x.zs += zs, x.zt += zt, x.zh += zh, x.forward += forward, x.reverse += reverse, x.same = same;
    }
    return x;
}

/* D of a row. */
static double divergence_of(const sums *x, float beta) {
    double ratio = log(x->zs / x->zt), kl = 0;
    if (DIVERGENCE == jsd) return beta * (x->forward - log(x->zt)) + x->reverse - (1.0 - beta) * log(x->zs);
    if (!IS_KL) return x->forward;
    if (DIVERGENCE != reverse_kl) kl += ratio - x->forward / x->zt;
    if (DIVERGENCE != forward_kl) kl += x->reverse / x->zs - ratio;
    return kl;
}

/* dD/ds at one class. */
static double slope_at(const sums *x, double s, double t, float beta) {
    double q = exp(s) / x->zs, p = exp(t) / x->zt;
    float h;
    if (DIVERGENCE == forward_kl) return q - p;
    if (DIVERGENCE == reverse_kl) return q * (s - t - x->reverse / x->zs);
    if (DIVERGENCE == symmetric_kl) return q * (s - t - x->reverse / x->zs + 1) - p;
    mixture_terms((float)s, (float)t, (float)q, (float)p, beta, &h);
    return h - q * x->reverse;
}

/* stats: soft, hard, and whether a class is on top in both. room: 2 * columns floats of this thread. */
static void dense_row(STUDENT *student, const TEACHER *teacher, int64_t columns, int64_t label, const float *weights,
                      float beta, float temperature, int64_t gradient, double *stats, float *room) {
    int wrong = label != -100 && (label < 0 || label >= columns), labelled = !wrong && label >= 0;
    float label_s = labelled ? READ(student + label) : 0, label_t = labelled ? READ(teacher + label) : 0;
    sums x = sum_row(student, teacher, columns, temperature, room);
    float top_s = x.top_s, top_t = x.top_t;
    if (!IS_KL) {
        float by_zs = (float)(1 / x.zs), by_zt = (float)(1 / x.zt);
        for (int64_t first = 0; first < columns; first += BLOCK) {
            int64_t last = first + BLOCK < columns ? first + BLOCK : columns;
            float value = 0, mean = 0;
#pragma omp simd reduction(+ : value, mean)
            for (int64_t j = first; j < last; j++) {
                float s = READ(student + j) - top_s, t = READ(teacher + j) - top_t, h;
                room[j] *= by_zs;
                value += mixture_terms(s, t, room[j], room[columns + j] * by_zt, beta, &h);
                mean += h;
                room[columns + j] = h;
            }
            x.forward += value, x.reverse += mean;
        }
    }
    double s_label = (double)label_s - top_s, t_label = (double)label_t - top_t;
    stats[0] = divergence_of(&x, beta);
    stats[1] = wrong ? NAN : labelled ? log(x.zh) - temperature * s_label : 0;
    stats[2] = x.same == 0;
    if (!gradient) return;
    float of_q = (float)(weights[0] / x.zs), of_p = (float)(weights[0] / x.zt), zs = (float)x.zs;
    float of_hard = !HARD ? 0.0f : wrong && weights[1] != 0 ? NAN : (float)(weights[1] / x.zh);
    float mean = (float)(IS_KL ? x.reverse / x.zs - (DIVERGENCE == symmetric_kl) : x.reverse);
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) {
        float s = READ(student + j) - top_s, t = READ(teacher + j) - top_t, es = room[j], other = room[columns + j], g;
        if (DIVERGENCE == forward_kl) g = es * of_q - other * of_p;
        else if (DIVERGENCE == reverse_kl) g = es * (s - t - mean) * of_q;
        else if (DIVERGENCE == symmetric_kl) g = es * (s - t - mean) * of_q - other * of_p;
        else g = (other - es * mean) * weights[0], es *= zs; /* q and h are what a mixture left in room */
        if (HARD) g += power_of(es, s, temperature) * of_hard;
        WRITE(student + j, g);
    }
    if (labelled && HARD) { /* unrounded: there 1 - q may be less than the tile can hold */
        double of_label = exp(temperature * s_label) / x.zh - 1;
        WRITE(student + label, (float)(weights[0] * slope_at(&x, s_label, t_label, beta) + weights[1] * of_label));
    }
}

/* Rows lie `stride_s` and `stride_t` elements apart; labels [rows]; weights [rows, 2]; stats [rows, 3]; room
 * [threads, 2, columns]. */
void dense_tile(STUDENT *student, const TEACHER *teacher, int64_t rows, int64_t columns, int64_t stride_s,
                int64_t stride_t, const int64_t *labels, const float *weights, float beta, float temperature,
                int64_t gradient, double *stats, float *room, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; i++)
            dense_row(student + i * stride_s, teacher + i * stride_t, columns, labels[i], weights + 2 * i, beta,
                      temperature, gradient, stats + 3 * i, room + 2 * part * columns);
}

/* Of a row the maximum and the sums of es and exp(T s), block by block; `room` keeps each block's es, relative to the
 * maximum so far, which goes to `tops`. */
static void sum_sparse(const STUDENT *row, int64_t columns, float temperature, double *stats, float *room,
                       float *tops) {
    float top = -INFINITY;
    double total = 0, total_hard = 0;
    for (int64_t first = 0, block = 0; first < columns; first += BLOCK, block++) {
        int64_t last = first + BLOCK < columns ? first + BLOCK : columns;
        float before = top, sum = 0, hard = 0;
#pragma omp simd reduction(max : top)
        for (int64_t j = first; j < last; j++) top = top > READ(row + j) ? top : READ(row + j);
        if (top > before) total *= exp((double)before - top), total_hard *= exp(temperature * ((double)before - top));
#pragma omp simd reduction(+ : sum, hard)
        for (int64_t j = first; j < last; j++) {
            float s = READ(row + j) - top, es = exponential(s);
            sum += es;
            if (HARD) hard += power_of(es, s, temperature);
            room[j] = es;
        }
        total += sum, total_hard += hard, tops[block] = top;
    }
    double of_row[] = {top, total, HARD ? total_hard : total};
    memcpy(stats, of_row, sizeof of_row);
}

/* The row becomes soft * es + hard * exp(T s), where `top` is its maximum, of what `sum_sparse` left. */
static void overwrite_sparse(STUDENT *row, int64_t columns, float temperature, float top, double soft, double hard,
                             const float *room, const float *tops) {
    for (int64_t first = 0, block = 0; first < columns; first += BLOCK, block++) {
        int64_t last = first + BLOCK < columns ? first + BLOCK : columns;
        double below = (double)tops[block] - top;
        float of_soft = (float)(soft * exp(below)), of_hard = (float)(HALVES ? hard * exp(temperature * below) : hard);
#pragma omp simd
        for (int64_t j = first; j < last; j++) {
            float g = of_soft * room[j];
            if (HARD) g += of_hard * power_of(room[j], HALVES ? 0 : READ(row + j) - top, temperature);
            WRITE(row + j, g);
        }
    }
}

/* Of each row [3] the maximum, the sum of es and that of exp(T s). room: 2 * columns floats of each thread. */
void sum_tile(const STUDENT *student, int64_t rows, int64_t columns, int64_t stride, float temperature, double *stats,
              float *room, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; i++) {
            float *es = room + 2 * part * columns;
            sum_sparse(student + i * stride, columns, temperature, stats + 3 * i, es, es + columns);
        }
}

/* A row's forward KL, for draws the cross-entropy to them, its hard loss and whether `leader` is on top, and with
 * `gradient` the row's gradient, as losses/tile_sparse.py in torch. log_p: log-probabilities of the ids [k] and, in
 * `tail`, of all others; NULL for draws. The label -100 is none; with any other that is no class the row is NaN where
 * its hard loss weighs. */
static void sparse_row(STUDENT *row, int64_t columns, double temperature, const int64_t *ids, int64_t k,
                      const double *log_p, double tail, int64_t leader, int64_t label, const double *weights,
                      int64_t gradient, double *stats, float *room) {
    double s[k], p[k], es[k], hard[k], sums[3], of_kept = 0, hard_of_kept = 0, peak = -INFINITY;
    int wrong = label != -100 && (label < 0 || label >= columns), labelled = !wrong && label >= 0;
    double at_label = labelled ? READ(row + label) : 0, at_leader = READ(row + leader);
    for (int64_t j = 0; j < k; j++) s[j] = READ(row + ids[j]), peak = peak > s[j] ? peak : s[j];
    if (log_p) /* the rest is summed without them: taken from the sum of all, a small one would be lost */
        for (int64_t j = 0; j < k; j++) WRITE(row + ids[j], -0x1p126f);
    sum_sparse(row, columns, (float)temperature, sums, room, room + columns);
    double top = sums[0], total = log_p && k == columns ? 0 : sums[1], first = top > peak ? top : peak;
    for (int64_t j = 0; j < k; j++) {
        es[j] = exp(s[j] - first), hard[j] = !HARD || temperature == 1 ? es[j] : exp(temperature * (s[j] - first));
        if (log_p) of_kept += es[j], hard_of_kept += hard[j];
    }
    double below = exp(top - first), all = total * below + of_kept, log_all = first + log(all);
    double hard_below = exp(temperature * (top - first)), all_hard = sums[2] * hard_below + hard_of_kept;
    double of_rest = log_p ? exp(tail) : 0, mass = log_p ? of_rest : 1, soft = 0;
    if (of_rest > 0) soft = of_rest * (tail - (top + log(total) - log_all));
    for (int64_t j = 0; j < k; j++) {
        p[j] = log_p ? exp(log_p[j]) : 1.0 / k;
        if (p[j] > 0) soft += p[j] * ((log_p ? log_p[j] : 0) - (s[j] - log_all));
        if (log_p) mass += p[j];
    }
    stats[0] = soft, stats[1] = wrong ? NAN : labelled ? log(all_hard) - temperature * (at_label - first) : 0;
    stats[2] = at_leader >= first;
    if (!gradient) return;
    double of_soft = weights[0] * mass / all, of_hard = HARD ? weights[1] / all_hard : 0;
    if (wrong && weights[1] != 0) of_hard = NAN;
    double soft_of_row = of_soft * below - weights[0] * of_rest / total;
    overwrite_sparse(row, columns, (float)temperature, (float)top, soft_of_row, of_hard * hard_below, room,
                     room + columns);
    if (HARD && labelled) {
        double g = soft_of_row * exp(at_label - top) + of_hard * exp(temperature * (at_label - first)) - weights[1];
        WRITE(row + label, (float)g);
    }
    for (int64_t j = 0; j < k; j++) room[ids[j]] = 0;
    for (int64_t j = 0; j < k; j++) room[ids[j]] += 1; /* an id that was drawn n times has n shares */
    for (int64_t j = 0; j < k; j++) {
        double g = of_soft * es[j] - weights[0] * p[j] * room[ids[j]] + of_hard * hard[j];
        WRITE(row + ids[j], (float)(ids[j] == label ? g - weights[1] : g));
    }
}

/* ids [rows, k]; log_p [rows, k] and tails [rows], or NULL; leaders and labels [rows]; weights [rows, 2]; stats
 * [rows, 3]; room [threads, 2, columns]. */
void sparse_tile(STUDENT *student, int64_t rows, int64_t columns, int64_t stride, float temperature,
                 const int64_t *ids, int64_t k, const double *log_p, const double *tails, const int64_t *leaders,
                 const int64_t *labels, const double *weights, int64_t gradient, double *stats, float *room,
                 int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t i = rows * part / threads; i < rows * (part + 1) / threads; i++)
            sparse_row(student + i * stride, columns, temperature, ids + k * i, k,
                      log_p ? log_p + k * i : NULL, log_p ? tails[i] : 0, leaders[i], labels[i], weights + 2 * i,
                      gradient, stats + 3 * i, room + 2 * part * columns);
}

/* Every row becomes of_row[1] * es + of_row[2] * exp(T s), where of_row[0] is its maximum. */
void overwrite_tile(STUDENT *student, int64_t rows, int64_t columns, int64_t stride, float temperature,
                    const float *of_rows, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        STUDENT *row = student + i * stride;
        float top = of_rows[3 * i], of_soft = of_rows[3 * i + 1], of_hard = of_rows[3 * i + 2];
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
            float s = READ(row + j) - top, es = exponential(s), g = of_soft * es;
            if (HARD) g += of_hard * power_of(es, s, temperature);
            WRITE(row + j, g);
        }
    }
}
