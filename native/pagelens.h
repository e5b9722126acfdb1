/* Symbols of libpagelens.so that Python reaches through ctypes. */
#ifndef PAGELENS_H
#define PAGELENS_H
#define PL_EXPORT __attribute__((visibility("default")))
#endif
