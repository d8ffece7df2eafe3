// Stand-in for the CUDA runtime.
#pragma once

#include "cuda_runtime_api.h"
