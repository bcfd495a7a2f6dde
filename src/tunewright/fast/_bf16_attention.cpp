// Causal attention and its gradient in bf16, over samples that follow one another in a row.
//
// FlashAttention's sums (Dao et al. 2022, arXiv:2205.14135), with scores held transposed: keys are rows, queries are
// columns. So a query's maximum, sum and delta lie in vector lanes, and every product finds its operands as `square`
// wants them, without a transposition inside the loops:
//
//     S' = K Q'     O' += V' P'     dP' = V dO'     dV += P' dO     dK += dS' Q     dQ' += K' dS'
//
// Suffixes: _rows is [tokens, D]; _cols is [D, tokens]; _by_d holds pairs of features [D/2, tokens]; _by_t holds pairs of
// tokens [tokens/2, D].

#include "_squares.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>


namespace {

constexpr int BLOCK = 64;  // queries, and keys, worked on at once
constexpr int STEP = 32;   // samples are filled up to a multiple of this

struct Rows {  // one head of a tensor [heads, tokens, D]
    bf16* at;
    int64_t stride;
    bf16* operator[](int64_t token) const { return at + token * stride; }
};

struct Tensor {
    bf16* at;
    int64_t head, token;  // strides, in elements
    Rows rows(int64_t h, int64_t first) const { return {at + h * head + first * token, token}; }
};

// C [rows x cols] (+)= A [rows x depth] B; all multiples of 32
template <bool ADD>
inline void product(
    float* C, int ldc, const bf16* A, int lda, const pair* B, int ldb, int rows, int cols, int depth) {
    for (int i = 0; i < rows; i += 32)
        for (int j = 0; j < cols; j += 32)
            square<ADD>(C + i * ldc + j, ldc, A + i * lda, lda, B + j, ldb, depth / 32);
}

// ---- layouts

// The first n of `padded` tokens, and zeros after them
template <int D>
void copy(bf16* to_rows, Rows from, int n, int padded) {
    for (int t = 0; t < n; ++t) std::memcpy(to_rows + t * D, from[t], D * 2);
    std::memset(to_rows + n * D, 0, size_t(padded - n) * D * 2);
}

template <int D>
void by_d(pair* to, int ld, const bf16* rows, int tokens) {
    for (int t = 0; t < tokens; t += 16)
        for (int d = 0; d < D; d += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows + (t + i) * D + d);
            transpose(r);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (d / 2 + i) * ld + t, r[i]);
        }
}

template <int D>
void by_t(pair* to, const bf16* rows, int tokens) {
    for (int t = 0; t < tokens; t += 2)
        for (int d = 0; d < D; d += 16)
            _mm512_storeu_si512(to + t / 2 * D + d, halves(load16(rows + t * D + d), load16(rows + (t + 1) * D + d)));
}

template <int D>
void columns(bf16* to, int ld, const bf16* rows, int tokens) {
    for (int t = 0; t < tokens; t += 32)
        for (int d = 0; d < D; d += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = halves(load16(rows + (t + 2 * i) * D + d), load16(rows + (t + 2 * i + 1) * D + d));
            transpose(r);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (d + i) * ld + t, r[i]);
        }
}

// The first n rows of the transposed `cols`, each times its factor
template <int D>
void write_transposed(Rows to, const float* cols, int ld, const float* factor, int n) {
    for (int t = 0; t < n; t += 16)
        for (int d = 0; d < D; d += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(cols + (d + i) * ld + t);
            transpose(r);
            for (int i = 0; i < std::min(16, n - t); ++i) {
                const __m512 x = _mm512_mul_ps(_mm512_castsi512_ps(r[i]), _mm512_set1_ps(factor[t + i]));
                store16(to[t + i] + d, narrow(x));
            }
        }
}

template <int D>
void write(Rows to, const float* rows, float factor, int n) {
    for (int t = 0; t < n; ++t)
        for (int d = 0; d < D; d += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(rows + t * D + d), _mm512_set1_ps(factor));
            store16(to[t] + d, narrow(x));
        }
}

// ---- softmax

// Of 16 queries from `query` on, those that may look at `key`
inline __mmask16 sees(int key, int query) {
    const int behind = key - query;
    return behind <= 0 ? 0xffff : behind >= 16 ? 0 : __mmask16(0xffff << behind);
}

struct Space {  // one thread's
    std::vector<char> bytes;
    char* next = nullptr;
    void begin(size_t total) {
        if (bytes.size() < total + 4096) bytes.resize(total + 4096);
        next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
    }
    template <class T>
    T* take(size_t count) {
        T* taken = reinterpret_cast<T*>(next);
        next += (count * sizeof(T) + 63) / 64 * 64;
        return taken;
    }
};

thread_local Space space;

struct Work {
    Tensor query, key, value, out;
    float* logsumexp;  // [heads, tokens], to the base 2
    Tensor grad, for_query, for_key, for_value;
    int64_t heads, groups, tokens;
    float scale;
};

template <int D>
void forward(const Work& w, int g, int first, int n) {
    const int T = (n + STEP - 1) / STEP * STEP;
    space.begin(size_t(T) * D * 6 + (1 << 18));
    bf16 *keys_rows = space.take<bf16>(T * D), *rows = space.take<bf16>(T * D), *values_cols = space.take<bf16>(T * D);
    pair *query_by_d = space.take<pair>(D / 2 * BLOCK), *shares_by_t = space.take<pair>(BLOCK / 2 * BLOCK);
    float *scores = space.take<float>(BLOCK * BLOCK), *out_cols = space.take<float>(D * BLOCK);
    bf16* query_rows = space.take<bf16>(BLOCK * D);
    alignas(64) float top[BLOCK], sum[BLOCK], kept[BLOCK];
    copy<D>(keys_rows, w.key.rows(g, first), n, T);
    copy<D>(rows, w.value.rows(g, first), n, T);
    columns<D>(values_cols, T, rows, T);
    const __m512 scale = _mm512_set1_ps(w.scale * LOG2E);
    const int64_t repeats = w.heads / w.groups;
    for (int64_t h = g * repeats; h < (g + 1) * repeats; ++h)
        for (int q = 0; q < T; q += BLOCK) {
            const int queries = std::min(BLOCK, T - q), real = std::min(BLOCK, n - q);
            copy<D>(query_rows, w.query.rows(h, first + q), real, queries);
            by_d<D>(query_by_d, BLOCK, query_rows, queries);
            for (int k = 0; k <= q; k += BLOCK) {
                const int keys = std::min(BLOCK, T - k);
                product<false>(scores, BLOCK, keys_rows + k * D, D, query_by_d, BLOCK, keys, queries, D);
                for (int c = 0; c < queries; c += 16) {
                    __m512 most = k ? _mm512_load_ps(top + c) : _mm512_set1_ps(-INFINITY);
                    const __m512 before = most;
                    for (int r = 0; r < keys; ++r) {
                        const __m512 s = _mm512_load_ps(scores + r * BLOCK + c);
                        most = _mm512_mask_max_ps(most, sees(k + r, q + c), most, _mm512_mul_ps(s, scale));
                    }
                    const __m512 keep = _mm512_maskz_mov_ps(k ? 0xffff : 0, exp2(_mm512_sub_ps(before, most)));
                    __m512 total = k ? _mm512_mul_ps(_mm512_load_ps(sum + c), keep) : _mm512_setzero_ps();
                    for (int r = 0; r < keys; r += 2) {
                        __m512 p[2];
                        for (int i = 0; i < 2; ++i) {
                            const __m512 s = _mm512_load_ps(scores + (r + i) * BLOCK + c);
                            p[i] = _mm512_maskz_mov_ps(
                                sees(k + r + i, q + c), exp2(_mm512_fmsub_ps(s, scale, most)));
                            total = _mm512_add_ps(total, p[i]);
                        }
                        _mm512_store_si512(shares_by_t + r / 2 * BLOCK + c, halves(narrow(p[0]), narrow(p[1])));
                    }
                    _mm512_store_ps(top + c, most);
                    _mm512_store_ps(sum + c, total);
                    if (k)
                        for (int d = 0; d < D; ++d) {
                            float* at = out_cols + d * BLOCK + c;
                            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), keep));
                        }
                }
                if (k)
                    product<true>(out_cols, BLOCK, values_cols + k, T, shares_by_t, BLOCK, D, queries, keys);
                else
                    product<false>(out_cols, BLOCK, values_cols + k, T, shares_by_t, BLOCK, D, queries, keys);
            }
            for (int i = 0; i < real; ++i) {
                kept[i] = 1 / sum[i];
                w.logsumexp[h * w.tokens + first + q + i] = top[i] + __builtin_log2f(sum[i]);
            }
            write_transposed<D>(w.out.rows(h, first + q), out_cols, BLOCK, kept, real);
        }
}

template <int D>
void backward(const Work& w, int g, int first, int n) {
    const int T = (n + STEP - 1) / STEP * STEP;
    space.begin(size_t(T) * D * 14 + (1 << 19));
    bf16 *keys_rows = space.take<bf16>(T * D), *values_rows = space.take<bf16>(T * D), *keys_cols = space.take<bf16>(T * D);
    float *for_keys = space.take<float>(T * D), *for_values = space.take<float>(T * D);
    bf16* some_rows = space.take<bf16>(BLOCK * D);
    pair *query_by_d = space.take<pair>(D / 2 * BLOCK), *query_by_t = space.take<pair>(BLOCK / 2 * D);
    pair *grad_by_d = space.take<pair>(D / 2 * BLOCK), *grad_by_t = space.take<pair>(BLOCK / 2 * D);
    float *scores = space.take<float>(BLOCK * BLOCK), *shares_grad = space.take<float>(BLOCK * BLOCK);
    bf16 *shares = space.take<bf16>(BLOCK * BLOCK), *scores_grad = space.take<bf16>(BLOCK * BLOCK);
    pair* scores_grad_by_t = space.take<pair>(BLOCK / 2 * BLOCK);
    float* for_query_cols = space.take<float>(D * BLOCK);
    alignas(64) float top[BLOCK], delta[BLOCK], factor[BLOCK];
    copy<D>(keys_rows, w.key.rows(g, first), n, T);
    copy<D>(values_rows, w.value.rows(g, first), n, T);
    columns<D>(keys_cols, T, keys_rows, T);
    std::memset(for_keys, 0, size_t(T) * D * 4);
    std::memset(for_values, 0, size_t(T) * D * 4);
    const __m512 scale = _mm512_set1_ps(w.scale * LOG2E);
    const int64_t repeats = w.heads / w.groups;
    for (int64_t h = g * repeats; h < (g + 1) * repeats; ++h)
        for (int q = 0; q < T; q += BLOCK) {
            const int queries = std::min(BLOCK, T - q), real = std::min(BLOCK, n - q);
            copy<D>(some_rows, w.query.rows(h, first + q), real, queries);
            by_d<D>(query_by_d, BLOCK, some_rows, queries);
            by_t<D>(query_by_t, some_rows, queries);
            copy<D>(some_rows, w.grad.rows(h, first + q), real, queries);
            by_d<D>(grad_by_d, BLOCK, some_rows, queries);
            by_t<D>(grad_by_t, some_rows, queries);
            const Rows out = w.out.rows(h, first + q);
            for (int i = 0; i < queries; ++i) {
                __m512 total = _mm512_setzero_ps();
                for (int d = 0; i < real && d < D; d += 16)
                    total = _mm512_fmadd_ps(wide(some_rows + i * D + d), wide(out[i] + d), total);
                delta[i] = _mm512_reduce_add_ps(total);
                top[i] = i < real ? w.logsumexp[h * w.tokens + first + q + i] : 0;
                factor[i] = w.scale;
            }
            for (int k = 0; k <= q; k += BLOCK) {
                const int keys = std::min(BLOCK, T - k);
                product<false>(scores, BLOCK, keys_rows + k * D, D, query_by_d, BLOCK, keys, queries, D);
                product<false>(shares_grad, BLOCK, values_rows + k * D, D, grad_by_d, BLOCK, keys, queries, D);
                for (int r = 0; r < keys; r += 2)
                    for (int c = 0; c < queries; c += 16) {
                        const __m512 most = _mm512_load_ps(top + c), less = _mm512_load_ps(delta + c);
                        __m256i ds[2];
                        for (int i = 0; i < 2; ++i) {
                            const int at = (r + i) * BLOCK + c;
                            const __m512 s = _mm512_fmsub_ps(_mm512_load_ps(scores + at), scale, most);
                            const __m512 p = _mm512_maskz_mov_ps(sees(k + r + i, q + c), exp2(s));
                            const __m512 d = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(shares_grad + at), less));
                            ds[i] = narrow(d);
                            store16(shares + at, narrow(p));
                            store16(scores_grad + at, ds[i]);
                        }
                        _mm512_store_si512(scores_grad_by_t + r / 2 * BLOCK + c, halves(ds[0], ds[1]));
                    }
                product<true>(for_values + k * D, D, shares, BLOCK, grad_by_t, D, keys, D, queries);
                product<true>(for_keys + k * D, D, scores_grad, BLOCK, query_by_t, D, keys, D, queries);
                if (k)
                    product<true>(for_query_cols, BLOCK, keys_cols + k, T, scores_grad_by_t, BLOCK, D, queries, keys);
                else
                    product<false>(for_query_cols, BLOCK, keys_cols + k, T, scores_grad_by_t, BLOCK, D, queries, keys);
            }
            write_transposed<D>(w.for_query.rows(h, first + q), for_query_cols, BLOCK, factor, real);
        }
    write<D>(w.for_key.rows(g, first), for_keys, w.scale, n);
    write<D>(w.for_value.rows(g, first), for_values, 1, n);
}

using Pass = void (*)(const Work&, int, int, int);

// Each sample and group of heads is computed by one thread, so that sums do not depend on how many there are
void each(Pass pass, const Work& work, const int64_t* ends, int64_t samples) {
    std::vector<int64_t> order(samples);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return ends[a + 1] - ends[a] > ends[b + 1] - ends[b];  // the longest first, so that all threads end together
    });
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < samples * work.groups; ++i) {
            const int64_t s = order[i / work.groups];
            if (ends[s + 1] > ends[s]) pass(work, int(i % work.groups), int(ends[s]), int(ends[s + 1] - ends[s]));
        }
    }
}

Pass choose(bool back, int64_t width) {
    switch (width) {
        case 32: return back ? backward<32> : forward<32>;
        case 64: return back ? backward<64> : forward<64>;
        case 96: return back ? backward<96> : forward<96>;
        case 128: return back ? backward<128> : forward<128>;
    }
    return nullptr;
}

}  // namespace

extern "C" {

// Tensors are [heads or groups, tokens, width] with strides for the first two; `ends` says where samples begin and the
// last one ends [samples + 1]. 0, or 1 for a width that there is no code for.
int attend(
    const int64_t* sizes, float scale, const int64_t* ends, void* const* at, const int64_t* strides, int back) {
    const int64_t samples = sizes[0], heads = sizes[1], groups = sizes[2], tokens = sizes[3], width = sizes[4];
    const Pass pass = choose(back, width);
    if (!pass) return 1;
    Tensor t[8] = {};
    for (int i = 0; i < (back ? 8 : 4); ++i) t[i] = {static_cast<bf16*>(at[i]), strides[2 * i], strides[2 * i + 1]};
    const Work work = {t[0], t[1], t[2], t[3], static_cast<float*>(at[8]), t[4], t[5], t[6], t[7],
                       heads, groups, tokens, scale};
    each(pass, work, ends, samples);
    return 0;
}
}
