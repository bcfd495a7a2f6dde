// Cross-entropy of rows of bf16 logits and its gradient, in one pass: a row is read from memory once and stays in the
// second cache until its gradient is written over it.

#include "_vectors.h"

#include <cmath>
#include <vector>

namespace {

constexpr float LEAST = -150;  // 2 to this power is nothing beside 1

// All lanes of x up to `left`, and `otherwise` in the rest
inline __m512 first(__m512 x, int64_t left, float otherwise) {
    if (left >= 16) return x;
    return _mm512_mask_mov_ps(_mm512_set1_ps(otherwise), __mmask16((1u << left) - 1), x);
}

inline __m512 read(const bf16* at, int64_t left) {
    if (left >= 16) return wide(at);
    const __m256i some = _mm256_maskz_loadu_epi16(__mmask16((1u << left) - 1), at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
}

// The loss of one row; its gradient in place of it, if that is wanted
float row(bf16* logits, int64_t size, int64_t label, bool gradient, float* shares) {
    const float own = _mm512_cvtss_f32(read(logits + label, 1));
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t v = 0; v < size; v += 16)
        most = _mm512_max_ps(most, first(read(logits + v, size - v), size - v, -INFINITY));
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 top = _mm512_set1_ps(largest), scale = _mm512_set1_ps(LOG2E), least = _mm512_set1_ps(LEAST);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t v = 0; v < size; v += 16) {
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(read(logits + v, size - v), top), scale);
        const __m512 share = exp2(_mm512_max_ps(least, x));  // a NaN stays one: it is the second operand
        sum = _mm512_add_ps(sum, first(share, size - v, 0));
        _mm512_storeu_ps(shares + v, share);
    }
    const float total = _mm512_reduce_add_ps(sum);
    if (gradient) {
        const __m512 part = _mm512_set1_ps(1 / total);
        shares[label] -= total;
        for (int64_t v = 0; v < size; v += 16) {
            const __m256i x = narrow(_mm512_mul_ps(_mm512_loadu_ps(shares + v), part));
            if (size - v >= 16)
                store16(logits + v, x);
            else
                _mm256_mask_storeu_epi16(logits + v, __mmask16((1u << (size - v)) - 1), x);
        }
    }
    return std::log(total) - (own - largest);
}

}  // namespace

extern "C" {

// It needs no right of its own
int allow() { return 0; }

// Logits [rows, size], their rows `stride` apart; labels [rows]; losses [rows]
void losses(bf16* logits, int64_t rows, int64_t size, int64_t stride, const int64_t* labels, float* found, int gradient) {
#pragma omp parallel
    {
        std::vector<float> shares(size + 16);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            found[r] = row(logits + r * stride, size, labels[r], gradient, shares.data());
    }
}
}
