// Lets AddressSanitizer see where a piece of scratch memory ends. Other builds have nothing of it.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define VD_GUARDED 1
#define VD_ALLOW(from, floats) __asan_unpoison_memory_region(from, (floats) * sizeof(float))
#define VD_FORBID(from, floats) __asan_poison_memory_region(from, (floats) * sizeof(float))
#else
#define VD_GUARDED 0
#define VD_ALLOW(from, floats) ((void)0)
#define VD_FORBID(from, floats) ((void)0)
#endif
