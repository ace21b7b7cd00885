// What the GPU test programs share: reports, errors, device arrays that are poisoned and have a guard behind them. The
// trainer is included before.
#include <string>
#include <type_traits>
#include <vector>

typedef std::vector<float> Floats;

static int passed, failed;

static void report(bool ok, const char* format, ...) {
    va_list args;
    va_start(args, format);
    printf(ok ? "ok   " : "FAIL ");
    vprintf(format, args);
    printf("\n");
    fflush(stdout);
    va_end(args);
    ok ? passed++ : failed++;
}
[[maybe_unused]] static void report(bool ok, const std::string& line) { report(ok, "%s", line.c_str()); }

static double relative_error(const Floats& x, const Floats& reference) {
    double difference = 0, norm = 0;
    if (x.size() != reference.size()) return INFINITY;
    #pragma omp parallel for reduction(+ : difference, norm)
    for (size_t i = 0; i < x.size(); i++) {
        double d = (double)x[i] - reference[i];
        difference += d * d;
        norm += (double)reference[i] * reference[i];
    }
    double error = sqrt(difference / (norm > 0 ? norm : 1));
    return error == error ? error : INFINITY;
}

// Device arrays are freed at the end of each test; the bytes behind each must survive.
static const size_t GUARD = 256;
static const int GUARD_BYTE = 0x5a;
static std::vector<void*> device_arrays;

template <typename T> static T* device_array(int64_t n) {
    char* p;
    cudaCheck(cudaMalloc(&p, n * sizeof(T) + GUARD));
    cudaCheck(cudaMemsetAsync(p, 0xff, n * sizeof(T), main_stream));  // NaN in every type
    cudaCheck(cudaMemsetAsync(p + n * sizeof(T), GUARD_BYTE, GUARD, main_stream));
    device_arrays.push_back(p);
    return (T*)p;
}
// To and from the device, converted to the type that is named.
template <typename Named = void, typename From> static auto to_device(const std::vector<From>& x) {
    typedef std::conditional_t<std::is_void_v<Named>, From, Named> T;
    std::vector<T> y(x.begin(), x.end());
    T* p = device_array<T>(y.size());
    cudaCheck(cudaMemcpyAsync(p, y.data(), y.size() * sizeof(T), cudaMemcpyHostToDevice, main_stream));
    cudaCheck(cudaStreamSynchronize(main_stream));
    return p;
}
template <typename Named = void, typename T> static auto to_host(const T* p, int64_t n) {
    typedef std::conditional_t<std::is_void_v<Named>, T, Named> To;
    std::vector<T> x(n);
    cudaCheck(cudaMemcpyAsync(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost, main_stream));
    cudaCheck(cudaStreamSynchronize(main_stream));
    return std::vector<To>(x.begin(), x.end());
}
static void free_device_arrays() {
    cudaCheck(cudaStreamSynchronize(main_stream));
    for (void* p : device_arrays) cudaCheck(cudaFree(p));
    device_arrays.clear();
}
