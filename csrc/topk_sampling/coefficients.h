// The polynomials of docs/noise.md, for every compiler.
#pragma once

namespace vd {
namespace topk_sampling {

// log2(1 + h) / h over 1/sqrt(2) <= 1 + h < sqrt(2), lowest power first.
constexpr float kLog2[] = {0x1.715476p+0f,  -0x1.715470p-1f, 0x1.ec73d6p-2f,
                           -0x1.715c4ep-2f, 0x1.26d384p-2f,  -0x1.e95be8p-3f,
                           0x1.b9c91cp-3f,  -0x1.a87d02p-3f, 0x1.01b6c6p-3f};
// |z| / (1 - 2p) in powers of sqrt(3 - log2(4p (1 - p))) - 4, lowest first.
constexpr float kProbit[] = {0x1.00932ap+2f,   0x1.4ef5b6p+0f,   -0x1.a90c08p-6f, 0x1.5c2a52p-9f,
                             0x1.de2860p-10f,  -0x1.c678f4p-9f,  0x1.75a73cp-9f,  -0x1.db4796p-13f,
                             -0x1.1f54e0p-11f, 0x1.0e46cap-14f,  0x1.58abc8p-15f};

constexpr float kLargestNormal = 0x1.95a1d4p+2f;  // no normal is further from 0

}  // namespace topk_sampling
}  // namespace vd
