/* The C core's version, so that a stale library beside newer Python is found at load time. */
#include "pagelens.h"

PL_EXPORT int pl_abi_version(void);
PL_EXPORT int pl_abi_version(void) { return 1; }
