// Causal attention and its gradient in bf16, over samples that follow one another in a row. A sample may go on from tokens
// that another one begins with: those are keys to it, and lie in the row once.
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
#include <map>
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

template <int D>
void copy(bf16* to_rows, Rows from, int n) {
    for (int t = 0; t < n; ++t) std::memcpy(to_rows + t * D, from[t], D * 2);
}

// The first n of `padded` tokens, and zeros after them
template <int D>
void copy(bf16* to_rows, Rows from, int n, int padded) {
    copy<D>(to_rows, from, n);
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

template <int D>
void write(float* to, const float* rows, float factor, int n) {
    for (int i = 0; i < n * D; i += 16)
        _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_loadu_ps(rows + i), _mm512_set1_ps(factor)));
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

struct Sample {
    int first, n;          // its own tokens in the row
    int from, shared;      // those that it goes on from
    float* for_shared;     // gradients of those as its keys, then as its values [2, shared, D], for each group
};

int up(int tokens) { return (tokens + STEP - 1) / STEP * STEP; }

// Keys or values that a sample looks at, and zeros after them
template <int D>
void copy(bf16* to_rows, const Tensor& from, int g, const Sample& s, int padded) {
    copy<D>(to_rows, from.rows(g, s.from), s.shared);
    copy<D>(to_rows + s.shared * D, from.rows(g, s.first), s.n, padded - s.shared);
}

template <int D>
void forward(const Work& w, int g, const Sample& s) {
    const int first = s.first, n = s.n, T = up(s.shared + n);
    space.begin(size_t(T) * D * 6 + (1 << 18));
    bf16 *keys_rows = space.take<bf16>(T * D), *rows = space.take<bf16>(T * D), *values_cols = space.take<bf16>(T * D);
    pair *query_by_d = space.take<pair>(D / 2 * BLOCK), *shares_by_t = space.take<pair>(BLOCK / 2 * BLOCK);
    float *scores = space.take<float>(BLOCK * BLOCK), *out_cols = space.take<float>(D * BLOCK);
    bf16* query_rows = space.take<bf16>(BLOCK * D);
    alignas(64) float top[BLOCK], sum[BLOCK], kept[BLOCK];
    copy<D>(keys_rows, w.key, g, s, T);
    copy<D>(rows, w.value, g, s, T);
    columns<D>(values_cols, T, rows, T);
    const __m512 scale = _mm512_set1_ps(w.scale * LOG2E);
    const int64_t repeats = w.heads / w.groups;
    for (int64_t h = g * repeats; h < (g + 1) * repeats; ++h)
        for (int q = 0; q < n; q += BLOCK) {
            const int queries = std::min(BLOCK, up(n - q)), real = std::min(BLOCK, n - q), at = s.shared + q;
            copy<D>(query_rows, w.query.rows(h, first + q), real, queries);
            by_d<D>(query_by_d, BLOCK, query_rows, queries);
            for (int k = 0; k < at + real; k += BLOCK) {
                const int keys = std::min(BLOCK, T - k);
                product<false>(scores, BLOCK, keys_rows + k * D, D, query_by_d, BLOCK, keys, queries, D);
                for (int c = 0; c < queries; c += 16) {
                    __m512 most = k ? _mm512_load_ps(top + c) : _mm512_set1_ps(-INFINITY);
                    const __m512 before = most;
                    for (int r = 0; r < keys; ++r) {
                        const __m512 s = _mm512_load_ps(scores + r * BLOCK + c);
                        most = _mm512_mask_max_ps(most, sees(k + r, at + c), most, _mm512_mul_ps(s, scale));
                    }
                    const __m512 keep = _mm512_maskz_mov_ps(k ? 0xffff : 0, exp2(_mm512_sub_ps(before, most)));
                    __m512 total = k ? _mm512_mul_ps(_mm512_load_ps(sum + c), keep) : _mm512_setzero_ps();
                    for (int r = 0; r < keys; r += 2) {
                        __m512 p[2];
                        for (int i = 0; i < 2; ++i) {
                            const __m512 s = _mm512_load_ps(scores + (r + i) * BLOCK + c);
                            p[i] = _mm512_maskz_mov_ps(
                                sees(k + r + i, at + c), exp2(_mm512_fmsub_ps(s, scale, most)));
                            total = _mm512_add_ps(total, p[i]);
                        }
                        _mm512_store_si512(shares_by_t + r / 2 * BLOCK + c, halves(narrow(p[0]), narrow(p[1])));
                    }
                    _mm512_store_ps(top + c, most);
                    _mm512_store_ps(sum + c, total);
                    if (k)
                        for (int d = 0; d < D; ++d) {
                            float* sums = out_cols + d * BLOCK + c;
                            _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), keep));
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
void backward(const Work& w, int g, const Sample& s) {
    const int first = s.first, n = s.n, T = up(s.shared + n);
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
    copy<D>(keys_rows, w.key, g, s, T);
    copy<D>(values_rows, w.value, g, s, T);
    columns<D>(keys_cols, T, keys_rows, T);
    std::memset(for_keys, 0, size_t(T) * D * 4);
    std::memset(for_values, 0, size_t(T) * D * 4);
    const __m512 scale = _mm512_set1_ps(w.scale * LOG2E);
    const int64_t repeats = w.heads / w.groups;
    for (int64_t h = g * repeats; h < (g + 1) * repeats; ++h)
        for (int q = 0; q < n; q += BLOCK) {
            const int queries = std::min(BLOCK, up(n - q)), real = std::min(BLOCK, n - q), at = s.shared + q;
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
            for (int k = 0; k < at + real; k += BLOCK) {
                const int keys = std::min(BLOCK, T - k);
                product<false>(scores, BLOCK, keys_rows + k * D, D, query_by_d, BLOCK, keys, queries, D);
                product<false>(shares_grad, BLOCK, values_rows + k * D, D, grad_by_d, BLOCK, keys, queries, D);
                for (int r = 0; r < keys; r += 2)
                    for (int c = 0; c < queries; c += 16) {
                        const __m512 most = _mm512_load_ps(top + c), less = _mm512_load_ps(delta + c);
                        __m256i ds[2];
                        for (int i = 0; i < 2; ++i) {
                            const int cell = (r + i) * BLOCK + c;
                            const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + cell), scale, most);
                            const __m512 p = _mm512_maskz_mov_ps(sees(k + r + i, at + c), exp2(x));
                            const __m512 d = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(shares_grad + cell), less));
                            ds[i] = narrow(d);
                            store16(shares + cell, narrow(p));
                            store16(scores_grad + cell, ds[i]);
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
    write<D>(w.for_key.rows(g, first), for_keys + s.shared * D, w.scale, n);
    write<D>(w.for_value.rows(g, first), for_values + s.shared * D, 1, n);
    float* apart = s.for_shared + size_t(g) * 2 * s.shared * D;
    write<D>(apart, for_keys, w.scale, s.shared);
    write<D>(apart + s.shared * D, for_values, 1, s.shared);
}

// Add to gradients of tokens what those that share them made of them. `samples` share the same ones.
template <int D>
void gather(const Work& w, int g, const std::vector<const Sample*>& samples) {
    int most = 0;
    for (const Sample* s : samples) most = std::max(most, s->shared);
    space.begin(size_t(most) * D * 4);
    float* sums = space.take<float>(size_t(most) * D);
    for (int kind = 0; kind < 2; ++kind) {
        const Rows rows = (kind ? w.for_value : w.for_key).rows(g, samples[0]->from);
        for (int t = 0; t < most; ++t)
            for (int d = 0; d < D; d += 16) _mm512_storeu_ps(sums + t * D + d, wide(rows[t] + d));
        for (const Sample* s : samples) {
            const float* apart = s->for_shared + (size_t(g) * 2 + kind) * s->shared * D;
            for (int i = 0; i < s->shared * D; i += 16)
                _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_loadu_ps(apart + i)));
        }
        write<D>(rows, sums, 1, most);
    }
}

using Pass = void (*)(const Work&, int, const Sample&);
using Gather = void (*)(const Work&, int, const std::vector<const Sample*>&);

// Each sample and group of heads is computed by one thread, so that sums do not depend on how many there are
void each(Pass pass, const Work& work, std::vector<Sample> samples) {
    std::stable_sort(samples.begin(), samples.end(), [](const Sample& a, const Sample& b) {
        return a.n + a.shared > b.n + b.shared;  // the longest first, so that all threads end together
    });
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < int64_t(samples.size()) * work.groups; ++i) {
            const Sample& sample = samples[i / work.groups];
            if (sample.n) pass(work, int(i % work.groups), sample);
        }
    }
}

void gather_each(Gather gather, const Work& work, const std::vector<Sample>& samples) {
    std::map<int, std::vector<const Sample*>> sharing;  // by where the tokens lie
    for (const Sample& sample : samples)
        if (sample.shared) sharing[sample.from].push_back(&sample);
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t g = 0; g < work.groups; ++g)
        for (const auto& one : sharing) gather(work, int(g), one.second);
}

struct Code {
    Pass forward, backward;
    Gather gather;
};

template <int D>
constexpr Code CODE = {forward<D>, backward<D>, gather<D>};

const Code* choose(int64_t width) {
    switch (width) {
        case 32: return &CODE<32>;
        case 64: return &CODE<64>;
        case 96: return &CODE<96>;
        case 128: return &CODE<128>;
    }
    return nullptr;
}

}  // namespace

extern "C" {

// Tensors are [heads or groups, tokens, width] with strides for the first two; `ends` says where samples begin and the
// last one ends [samples + 1], `prefixes` where the tokens begin that each goes on from, and how many they are
// [samples, 2], or nothing. `apart` has room for their gradients [groups, 2, all of their counts, width]. 0, or 1 for a
// width that there is no code for.
int attend(const int64_t* sizes, float scale, const int64_t* ends, const int64_t* prefixes, float* apart, void* const* at,
           const int64_t* strides, int back) {
    const int64_t count = sizes[0], heads = sizes[1], groups = sizes[2], tokens = sizes[3], width = sizes[4];
    const Code* code = choose(width);
    if (!code) return 1;
    Tensor t[8] = {};
    for (int i = 0; i < (back ? 8 : 4); ++i) t[i] = {static_cast<bf16*>(at[i]), strides[2 * i], strides[2 * i + 1]};
    const Work work = {t[0], t[1], t[2], t[3], static_cast<float*>(at[8]), t[4], t[5], t[6], t[7],
                       heads, groups, tokens, scale};
    std::vector<Sample> samples(count);
    for (int64_t i = 0; i < count; ++i) {
        Sample& s = samples[i];
        s = {int(ends[i]), int(ends[i + 1] - ends[i]), 0, 0, apart};
        if (!prefixes) continue;
        s.from = int(prefixes[2 * i]);
        s.shared = int(prefixes[2 * i + 1]);
        if (apart) apart += groups * 2 * s.shared * width;
    }
    each(back ? code->backward : code->forward, work, samples);
    if (back && prefixes) gather_each(code->gather, work, samples);
    return 0;
}
}
