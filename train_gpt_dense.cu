// The baseline: the same trainer with Lighthouse attention compiled out, so that all else is the same code.
#define DENSE_ONLY
#include "train_gpt_lighthouse.cu"
