// C [32 x 32] (+)= A [32 x 32 steps] B, the product that larger ones are made of: on matrix units where the processor has
// them (Intel AMX), else by its own bf16 instructions (AVX-512).
//
// A and C lie in rows. B holds pairs of rows side by side in 32 bits, since both multiply two numbers at a time.

#pragma once

#include "_vectors.h"

using pair = uint32_t;  // two bf16

#ifdef __AMX_BF16__

#include "_tiles.h"

template <bool ADD>
inline void square(float* C, int ldc, const bf16* A, int lda, const pair* B, int ldb, int steps) {
    const int c = ldc * 4, a = lda * 2, b = ldb * 4;
    if (ADD) {
        _tile_loadd(0, C, c);
        _tile_loadd(1, C + 16, c);
        _tile_loadd(2, C + 16 * ldc, c);
        _tile_loadd(3, C + 16 * ldc + 16, c);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int s = 0; s < steps; ++s) {
        _tile_loadd(4, A + 32 * s, a);
        _tile_loadd(6, B + 16 * s * ldb, b);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, B + 16 * s * ldb + 16, b);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, A + 16 * lda + 32 * s, a);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, c);
    _tile_stored(1, C + 16, c);
    _tile_stored(2, C + 16 * ldc, c);
    _tile_stored(3, C + 16 * ldc + 16, c);
}

#else

#include <cstring>

extern "C" int allow() { return 0; }  // it needs no right of its own

struct Tiles {};  // nor anything set

template <bool ADD>
inline void square(float* C, int ldc, const bf16* A, int lda, const pair* B, int ldb, int steps) {
    constexpr int ROWS = 8;  // 16 sums in registers, and two rows of B
    for (int i = 0; i < 32; i += ROWS, C += ROWS * ldc, A += ROWS * lda) {
        __m512 sums[ROWS][2];
        for (int r = 0; r < ROWS; ++r)
            for (int h = 0; h < 2; ++h) sums[r][h] = ADD ? _mm512_loadu_ps(C + r * ldc + 16 * h) : _mm512_setzero_ps();
        for (int k = 0; k < 16 * steps; ++k) {
            const __m512bh left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(B + k * ldb));
            const __m512bh right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(B + k * ldb + 16));
            for (int r = 0; r < ROWS; ++r) {
                int two;
                std::memcpy(&two, A + r * lda + 2 * k, 4);
                const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, left);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], a, right);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int h = 0; h < 2; ++h) _mm512_storeu_ps(C + r * ldc + 16 * h, sums[r][h]);
    }
}

#endif
