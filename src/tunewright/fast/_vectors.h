// Sixteen numbers at a time: bf16 in memory, fp32 in registers.

#pragma once

#include <immintrin.h>

#include <cstdint>

using bf16 = uint16_t;

constexpr float LOG2E = 1.44269504f;

inline __m256i load16(const bf16* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

inline __m512 wide(const bf16* at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(at)), 16));
}

inline __m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline void store16(bf16* at, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), x); }

// Two rows of bf16 as pairs
inline __m512i halves(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// 2 to the power of x <= 0 to fp32's precision: a polynomial for the fraction, the exponent for the rest
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.327647141e-03f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.675541330e-03f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550713275e-02f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402211972e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931469671e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.000000072e+00f));
    return _mm512_scalef_ps(p, whole);
}

inline void transpose(__m512i r[16]) {  // 16 x 16 of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}
