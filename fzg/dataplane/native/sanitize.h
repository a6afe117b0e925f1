/* What AddressSanitizer cannot know: which part of a buffer that is used again and again holds something now. */
#ifndef FZG_SANITIZE_H
#define FZG_SANITIZE_H

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define ALLOW(at, size) ASAN_UNPOISON_MEMORY_REGION(at, size)
#define FORBID(at, size) ASAN_POISON_MEMORY_REGION(at, size)
#else
#define ALLOW(at, size) ((void)(at), (void)(size))
#define FORBID(at, size) ((void)(at), (void)(size))
#endif

#endif
