// Proves that the CPU operations compute what they state: forwards against plain double loops, backwards against finite
// differences of those loops, and Lighthouse attention against its defining properties.
//
//   flags="-std=c++17 -O3 -march=native -fopenmp -DCPU_BACKEND -DUSE_CBLAS"
//   g++ $flags dev/test_ops.cpp -o build/test_ops -lopenblas && build/test_ops
//
// dev/cpu_ops.h is here twice: in fp32 as the trainer includes it, and with double in the place of float, which shows
// an error in a formula where fp32 would hide it in its rounding. Outputs are poisoned with NaN; those that accumulate
// start from random numbers. Errors are relative l2 norms: of the double build / of the fp32 build.
#define TRAINER_NO_MAIN
#include "../train_gpt_lighthouse.cu"
#undef CPU_OPS_H
#undef USE_CBLAS
#define float double
#define cpu cpu_double
#include "cpu_ops.h"
#undef cpu
#undef float
#include <functional>
#include <string>
#include <vector>

using namespace cpu_double;  // overloads: float* arguments choose the fp32 operation, double* the other
typedef std::vector<double> Doubles;
typedef std::vector<float> Floats;
typedef std::vector<int32_t> Ints;

// The double build differs from plain loops by the order of additions. fp32 rounds to 6e-8, and sums of terms of random
// sign lose a few times that. Central differences with a step of 1e-5 lose about 1e-10 of a smooth function.
static const double DOUBLE_BOUND = 1e-12, FLOAT_BOUND = 3e-6, DIFFERENCE_BOUND = 1e-7;

// ---- numbers --------------------------------------------------------------------------------------------------

static uint64_t random_state = 1;
static double uniform() {  // in [0, 1)
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (random_state >> 11) * 0x1p-53;
}

// Nearly normal, rounded to fp32 so that both builds see the same numbers.
static Doubles random_numbers(size_t n, double scale = 1, double offset = 0) {
    Doubles x(n);
    for (double& value : x) {
        double sum = 0;
        for (int i = 0; i < 6; i++) sum += uniform() - 0.5;
        value = (float)(sum * sqrt(2.0) * scale + offset);
    }
    return x;
}

// Inputs and results pass through double; R is float or double.
template <typename R> static std::vector<R> to(const Doubles& x) { return std::vector<R>(x.begin(), x.end()); }
template <typename R> static Doubles wide(const std::vector<R>& x) { return Doubles(x.begin(), x.end()); }
template <typename R> static std::vector<R> poison(size_t n) { return std::vector<R>(n, (R)NAN); }

static double distance(const Doubles& got, const Doubles& expected) {
    if (got.size() != expected.size()) return NAN;
    double error = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        error += (got[i] - expected[i]) * (got[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    return norm > 0 ? sqrt(error / norm) : sqrt(error);
}

static double dot(const Doubles& x, const Doubles& y) {
    double sum = x.size() == y.size() ? 0 : NAN;
    for (size_t i = 0; i < std::min(x.size(), y.size()); i++) sum += x[i] * y[i];
    return sum;
}

static Doubles minus(const Doubles& x, const Doubles& y) {
    Doubles z(x);
    for (size_t i = 0; i < y.size(); i++) z[i] -= y[i];
    return z;
}

// ---- a test is a line -----------------------------------------------------------------------------------------

static int passed = 0, failed = 0;
typedef std::vector<Doubles> Results;

struct Test {
    std::string name, figures;
    bool ok = true;

    explicit Test(const std::string& name) : name(name) {}
    ~Test() {
        printf("%s %s:%s\n", ok ? "ok  " : "FAIL", name.c_str(), figures.c_str());
        fflush(stdout);
        ok ? passed++ : failed++;
    }
    void add(bool holds, const std::string& text) {
        figures += (figures.empty() ? " " : ", ") + text;
        ok = ok && holds;
    }
    void that(bool holds, const std::string& what) {  // said once, though both builds may come by
        if (!holds || figures.find(what) == std::string::npos) add(holds, (holds ? "" : "NOT: ") + what);
    }
    void at_most(const std::string& what, double value, double bound) {
        char text[160];
        bool holds = value <= bound;  // NaN does not
        snprintf(text, sizeof(text), holds ? "%s %.1e" : "%s %.1e IS ABOVE %.0e", what.c_str(), value, bound);
        add(holds, text);
    }
    void errors(const std::string& what, double in_double, double double_bound, double in_float, double float_bound) {
        bool holds = in_double <= double_bound && in_float <= float_bound;
        char text[200];
        if (holds) snprintf(text, sizeof(text), "%s %.1e / %.1e", what.c_str(), in_double, in_float);
        else snprintf(text, sizeof(text), "%s %.1e / %.1e IS ABOVE %.0e / %.0e", what.c_str(), in_double, in_float,
                      double_bound, float_bound);
        add(holds, text);
    }
    void value(const std::string& what, const Doubles& in_double, const Doubles& in_float, const Doubles& expected,
               double float_bound = FLOAT_BOUND) {
        errors(what, distance(in_double, expected), DOUBLE_BOUND, distance(in_float, expected), float_bound);
    }
    // The gradient's products with random directions, which weigh every element, against central differences of the
    // loss along them; then fp32 against double. initial: what it was accumulated onto, empty when it overwrites.
    void gradient(const std::string& what, const Doubles& in_double, const Doubles& in_float, const Doubles& initial,
                  Doubles& x, const std::function<double()>& loss, double float_bound = FLOAT_BOUND) {
        const double step = 1e-5;
        Doubles numeric, analytic, kept = x;
        for (int i = 0; i < 6; i++) {
            Doubles direction = random_numbers(x.size());
            double change = 0;
            for (int sign = 1; sign >= -1; sign -= 2) {
                for (size_t j = 0; j < x.size(); j++) x[j] = kept[j] + sign * step * direction[j];
                change += sign * loss();
            }
            numeric.push_back(change / (2 * step));
            analytic.push_back(dot(minus(in_double, initial), direction));
        }
        x = kept;
        errors(what, distance(analytic, numeric), DIFFERENCE_BOUND, distance(in_float, in_double), float_bound);
    }
};

// ---- small operations -----------------------------------------------------------------------------------------
// In each test run(0.0) calls the double operations and run(0.0f) those in fp32.

static void test_exponential() {
    Test test("exp_fast");
    double worst = 0;
    for (int i = 0; i <= 870000; i++) {
        float x = -i * 1e-4f;
        worst = std::max(worst, fabs(cpu::exp_fast(x) / exp((double)x) - 1));
    }
    test.at_most("relative error on [-87, 0]", worst, 2e-7);
    test.that(cpu::exp_fast(0.0f) == 1 && cpu::exp_fast(-INFINITY) == 0 && cpu::exp_fast(-1e30f) == 0,
              "1 at 0, 0 far below");
    test.that(std::isnan(cpu::exp_fast((float)NAN)) && std::isnan(cpu::exp_fast(-(float)NAN)), "NaN stays");
}

static void test_encoder(int B, int64_t T, int C, int64_t t0, bool learned) {
    Test test(text("encoder B %d T %d C %d t0 %d%s", B, (int)T, C, (int)t0, learned ? " learned positions" : ""));
    const int Vp = 11;
    size_t n = B * T * C, positions = (t0 + T) * C;
    Doubles wte = random_numbers(Vp * C), wpe = random_numbers(positions), dout = random_numbers(n);
    Doubles dwte = random_numbers(Vp * C), dwpe = random_numbers(positions);
    std::vector<int> tokens(B * T);
    for (int& token : tokens) token = (int)(uniform() * 7);  // they repeat, and some rows have no token
    auto run = [&](auto zero) -> Results {
        typedef decltype(zero) R;
        std::vector<R> out = poison<R>(n), e = to<R>(wte), p = to<R>(wpe), dy = to<R>(dout);
        std::vector<R> de = to<R>(dwte), dp = to<R>(dwpe);
        encoder_forward(out.data(), tokens.data(), e.data(), learned ? p.data() : NULL, B, T, C, t0);
        encoder_backward(de.data(), learned ? dp.data() : NULL, dy.data(), tokens.data(), B, T, C, t0, Vp);
        return {wide(out), wide(de), wide(dp)};
    };
    Results d = run(0.0), f = run(0.0f);
    Doubles expected(n);
    for (size_t i = 0; i < n; i++) {
        size_t c = i % C, t = i / C % T, token = tokens[i / C];
        expected[i] = wte[token * C + c] + (learned ? wpe[(t0 + t) * C + c] : 0);
        dwte[token * C + c] += dout[i];
        if (learned) dwpe[(t0 + t) * C + c] += dout[i];
    }
    test.value("out", d[0], f[0], expected);
    test.value("dwte", d[1], f[1], dwte);
    test.value("dwpe", d[2], f[2], dwpe);
}

static void test_layernorm(int64_t N, int C) {
    Test test(text("layernorm N %d C %d", (int)N, C));
    Doubles x = random_numbers(N * C, 1, 3), weight = random_numbers(C), bias = random_numbers(C);
    Doubles dout = random_numbers(N * C), dx = random_numbers(N * C), dw = random_numbers(C), db = random_numbers(C);
    Doubles mean(N), rstd(N);
    auto forward = [&] {
        Doubles out(N * C);
        for (int64_t i = 0; i < N; i++) {
            double square = mean[i] = 0;
            for (int c = 0; c < C; c++) mean[i] += x[i * C + c] / C;
            for (int c = 0; c < C; c++) square += pow(x[i * C + c] - mean[i], 2) / C;
            rstd[i] = pow(square + 1e-5, -0.5);
            for (int c = 0; c < C; c++) out[i * C + c] = (x[i * C + c] - mean[i]) * rstd[i] * weight[c] + bias[c];
        }
        return out;
    };
    auto run = [&](auto zero) -> Results {
        typedef decltype(zero) R;
        std::vector<R> out = poison<R>(N * C), m = poison<R>(N), r = poison<R>(N), xr = to<R>(x), w = to<R>(weight);
        std::vector<R> b = to<R>(bias), dy = to<R>(dout), dxr = to<R>(dx), dwr = to<R>(dw), dbr = to<R>(db);
        std::vector<R> dsr = to<R>(db);
        layernorm_forward(out.data(), m.data(), r.data(), xr.data(), w.data(), b.data(), N, C);
        layernorm_backward(dxr.data(), dwr.data(), dbr.data(), dsr.data(), dy.data(), xr.data(), w.data(), m.data(),
                           r.data(), N, C);
        return {wide(out), wide(m), wide(r), wide(dxr), wide(dwr), wide(dbr), wide(dsr)};
    };
    Results d = run(0.0), f = run(0.0f);
    Doubles expected = forward();
    test.value("out", d[0], f[0], expected);
    test.value("mean", d[1], f[1], mean);
    test.value("rstd", d[2], f[2], rstd);
    auto loss = [&] { return dot(forward(), dout); };
    test.gradient("dinp", d[3], f[3], dx, x, loss);
    test.gradient("dweight", d[4], f[4], dw, weight, loss);
    test.gradient("dbias", d[5], f[5], db, bias, loss);
    Doubles sums = db;
    for (int64_t i = 0; i < N * C; i++) sums[i % C] += d[3][i];
    test.value("dsum", d[6], f[6], sums);
}

static long double gelu_reference(long double x) {  // long double, because 1 + tanh cancels
    return 0.5L * x * (1 + tanhl(sqrtl(2 / M_PIl) * (x + 0.044715L * powl(x, 3))));
}

static void test_matmul(int64_t N, int C, int OC, bool with_bias, bool with_addend) {
    const char *and_bias = with_bias ? " bias" : "", *and_addend = with_addend ? " addend" : "";
    Test test(text("matmul N %d C %d OC %d%s%s", (int)N, C, OC, and_bias, and_addend));
    Doubles x = random_numbers(N * C), weight = random_numbers(OC * C), bias = random_numbers(OC);
    Doubles addend = random_numbers(N * OC), dout = random_numbers(N * OC);
    Doubles dw = random_numbers(OC * C), db = random_numbers(OC), before_gelu = random_numbers(N * C);
    auto forward = [&] {
        Doubles out(N * OC);
        for (int64_t i = 0; i < N; i++) {
            for (int o = 0; o < OC; o++) {
                double sum = (with_bias ? bias[o] : 0) + (with_addend ? addend[i * OC + o] : 0);
                for (int c = 0; c < C; c++) sum += x[i * C + c] * weight[o * C + c];
                out[i * OC + o] = sum;
            }
        }
        return out;
    };
    auto run = [&](auto zero) -> Results {
        typedef decltype(zero) R;
        std::vector<R> out = poison<R>(N * OC), xr = to<R>(x), w = to<R>(weight), b = to<R>(bias), a = to<R>(addend);
        std::vector<R> dy = to<R>(dout), dx = poison<R>(N * C), dwr = to<R>(dw), dbr = to<R>(db);
        matmul_forward(out.data(), xr.data(), w.data(), with_bias ? b.data() : NULL,
                       with_addend ? a.data() : NULL, N, C, OC);
        matmul_backward(dx.data(), dwr.data(), false, with_bias ? dbr.data() : NULL, dy.data(), xr.data(), w.data(),
                        (R*)NULL, N, C, OC);
        std::vector<R> again = to<R>(dw);  // without dinp
        matmul_backward((R*)NULL, again.data(), false, (R*)NULL, dy.data(), xr.data(), w.data(), (R*)NULL,
                        N, C, OC);
        test.that(again == dwr, "dweight without dinp");
        std::vector<R> h = to<R>(before_gelu), g = poison<R>(N * C), dg = poison<R>(N * C);  // inp = GELU(h)
        gelu_forward(g.data(), h.data(), N * C);
        std::vector<R> fresh = poison<R>(OC * C), zeros(OC * C);
        matmul_backward(dg.data(), fresh.data(), true, (R*)NULL, dy.data(), g.data(), w.data(), h.data(), N, C, OC);
        matmul_backward((R*)NULL, zeros.data(), false, (R*)NULL, dy.data(), g.data(), w.data(), (R*)NULL, N, C, OC);
        test.that(fresh == zeros, "dweight written instead of added to");
        return {wide(out), wide(dx), wide(dwr), wide(dbr), wide(dg)};
    };
    Results d = run(0.0), f = run(0.0f);
    test.value("out", d[0], f[0], forward());
    auto loss = [&] { return dot(forward(), dout); };
    auto loss_of_gelu = [&] {
        double sum = 0;
        for (int64_t i = 0; i < N; i++) {
            for (int c = 0; c < C; c++) {
                double dinp = 0;
                for (int o = 0; o < OC; o++) dinp += dout[i * OC + o] * weight[o * C + c];
                sum += dinp * (double)gelu_reference(before_gelu[i * C + c]);
            }
        }
        return sum;
    };
    test.gradient("dinp before GELU", d[4], f[4], {}, before_gelu, loss_of_gelu);
    test.gradient("dinp", d[1], f[1], {}, x, loss);
    test.gradient("dweight", d[2], f[2], dw, weight, loss);
    if (with_bias) test.gradient("dbias", d[3], f[3], db, bias, loss);
    else test.that(d[3] == db && f[3] == db, "dbias untouched");
}

// Every FP8 number has the value that its definition says, every float rounds to the nearest of them.
static void test_fp8_numbers(bool gradient) {
    Test test(gradient ? "fp8 numbers, e5m2" : "fp8 numbers, e4m3");
    int bits = gradient ? 2 : 3, bias = gradient ? 15 : 7, largest = gradient ? 0x7b : 0x7e;
    bool values = true, rounds = true;
    for (int q = 0; q <= largest; q++) {
        int exponent = q >> bits;
        double mantissa = (q & ((1 << bits) - 1)) / (double)(1 << bits);
        double value = exponent ? pow(2, exponent - bias) * (1 + mantissa) : pow(2, 1 - bias) * mantissa;
        values = values && cpu::fp8_value(q, gradient) == value && cpu::fp8_value(q | 0x80, gradient) == -value;
        rounds = rounds && cpu::fp8_round((float)value, gradient) == q;
        rounds = rounds && cpu::fp8_round((float)-value, gradient) == (q | 0x80);
        if (q == largest) continue;
        float above = cpu::fp8_value(q + 1, gradient), middle = (float)(value + above) / 2;
        rounds = rounds && cpu::fp8_round(middle, gradient) == q + q % 2;  // a tie goes to the even one
        rounds = rounds && cpu::fp8_round(nextafterf(middle, 0), gradient) == q;
        rounds = rounds && cpu::fp8_round(nextafterf(middle, above), gradient) == q + 1;
    }
    test.that(values, "every value");
    test.that(cpu::fp8_value(largest, gradient) == (gradient ? 57344 : 448), "the largest");
    test.that(rounds, "to nearest, ties to even");
    bool held = cpu::fp8_round(1e30f, gradient) == largest && cpu::fp8_round(-INFINITY, gradient) == (largest | 0x80);
    for (float times : {1.01f, 1.1f, 1.9f, 2.1f}) held = held && cpu::fp8_round(times * (gradient ? 57344 : 448), gradient) == largest;
    test.that(held, "past the largest the largest");
    test.that(cpu::fp8_round((float)NAN, gradient) == 0x7f && std::isnan(cpu::fp8_value(0x7f, gradient)), "NaN stays");
}

// What the scale is made of is no smaller than any number that is quantized, through GELU and its slope too, and close to it.
static void test_fp8_amax() {
    Test test("fp8 amax");
    const int n = 1601;
    std::vector<float> pre(n), one(n, -1.0f), out(n), slope(n);
    for (int i = 0; i < n; i++) pre[i] = (i - 800) * 0.01f;
    cpu::gelu_forward(out.data(), pre.data(), n);
    cpu::gelu_backward(slope.data(), one.data(), pre.data(), n);
    auto largest = [](const std::vector<float>& x) {
        float most = 0;
        for (float value : x) most = std::max(most, fabsf(value));
        return most;
    };
    Fp8Scale plain = {}, gelu = {}, gradient = {}, lost = {};
    cpu::fp8_amax(&plain, slope.data(), NULL, n);
    cpu::fp8_amax(&gelu, NULL, pre.data(), n);
    cpu::fp8_amax(&gradient, one.data(), pre.data(), n);
    test.that(plain.amax == largest(slope), "of numbers");
    test.that(gelu.amax >= largest(out) && gelu.amax < 1.01f * largest(out), "of GELU");
    test.that(gradient.amax >= largest(slope) && gradient.amax < 1.01f * largest(slope), "of a gradient through GELU");
    slope[700] = NAN;
    cpu::fp8_amax(&lost, slope.data(), NULL, n);
    test.that(std::isnan(lost.amax), "NaN stays");
}

// A product with FP8 operands against the wide one: each operand is off by half a unit of its last bit at most.
static void test_fp8_matmul(int64_t N, int C, int OC, bool gelu) {
    Test test(text("fp8 matmul N %d C %d OC %d%s", (int)N, C, OC, gelu ? " GELU" : ""));
    auto floats = [](const Doubles& x) { return to<float>(x); };
    std::vector<float> x = floats(random_numbers(N * C)), w = floats(random_numbers(OC * C, 0.02));
    std::vector<float> dout = floats(random_numbers(N * OC, 1e-4)), pre = floats(random_numbers(N * OC));
    std::vector<float> bias = floats(random_numbers(OC, 0.1)), addend = floats(random_numbers(N * OC));
    std::vector<float> dw = floats(random_numbers(OC * C, 1e-4)), db = floats(random_numbers(OC, 1e-4));
    struct Both {
        std::vector<fp8_t> rows, columns;
        Fp8Scale scale = {};
        Both(int64_t n) : rows(n), columns(n) {}
        Fp8Matrix matrix() { return {rows.data(), columns.data(), &scale}; }
    } x8(N * C), w8(OC * C), d8(N * OC);
    std::vector<float> source = x, slope = dout;  // what is quantized, in the wide
    if (gelu) {
        cpu::gelu_forward(source.data(), x.data(), N * C);
        cpu::gelu_backward(slope.data(), dout.data(), pre.data(), N * OC);
    }
    const float *wide = gelu ? NULL : x.data(), *input = gelu ? x.data() : NULL, *gate = gelu ? pre.data() : NULL;
    cpu::fp8_amax(&x8.scale, wide, input, N * C);
    cpu::fp8_amax(&w8.scale, w.data(), NULL, OC * C);
    cpu::fp8_amax(&d8.scale, dout.data(), gate, N * OC);
    std::vector<float> expected_dw = dw, expected_db = db, out(N * OC), expected(N * OC), dx(N * C), expected_dx(N * C);
    cpu::fp8_quantize(x8.matrix(), NULL, wide, input, N, C, false);
    cpu::fp8_quantize(w8.matrix(), NULL, w.data(), NULL, OC, C, false);
    cpu::fp8_quantize(d8.matrix(), db.data(), dout.data(), gate, N, OC, true);
    bool transposed = true;
    for (int64_t i = 0; i < N; i++) {
        for (int c = 0; c < C; c++) transposed = transposed && x8.rows[i * C + c] == x8.columns[c * N + i];
    }
    test.that(transposed, "the columns are the rows' transpose");
    cpu::fp8_matmul_forward(out.data(), x8.matrix(), w8.matrix(), bias.data(), addend.data(), N, C, OC);
    cpu::fp8_matmul_backward(dx.data(), dw.data(), false, d8.matrix(), x8.matrix(), w8.matrix(), N, C, OC);
    cpu::matmul_forward(expected.data(), source.data(), w.data(), bias.data(), addend.data(), N, C, OC);
    cpu::matmul_backward(expected_dx.data(), expected_dw.data(), false, expected_db.data(), slope.data(), source.data(),
                         w.data(), NULL, N, C, OC);
    test.at_most("out", distance(::wide(out), ::wide(expected)), 0.05);
    test.at_most("dinp", distance(::wide(dx), ::wide(expected_dx)), 0.1);
    test.at_most("dweight", distance(::wide(dw), ::wide(expected_dw)), 0.1);
    test.at_most("dbias", distance(::wide(db), ::wide(expected_db)), FLOAT_BOUND);
}

static void test_gelu(int64_t n) {
    Test test(text("gelu n %d", (int)n));
    Doubles x = random_numbers(n), dout = random_numbers(n);
    auto forward = [&] {
        Doubles out(n);
        for (int64_t i = 0; i < n; i++) out[i] = gelu_reference(x[i]);
        return out;
    };
    auto run = [&](auto zero) -> Results {
        typedef decltype(zero) R;
        std::vector<R> out = poison<R>(n), xr = to<R>(x), dy = to<R>(dout), dx = poison<R>(n);
        gelu_forward(out.data(), xr.data(), n);
        gelu_backward(dx.data(), dy.data(), xr.data(), n);
        gelu_backward(dy.data(), dy.data(), xr.data(), n);
        test.that(dy == dx, "in place");
        return {wide(out), wide(dx)};
    };
    Results d = run(0.0), f = run(0.0f);
    test.value("out", d[0], f[0], forward());
    test.gradient("dinp", d[1], f[1], {}, x, [&] { return dot(forward(), dout); });
    float extremes[5] = {-1e4f, -30, 30, 1e4f, NAN}, out[5], slope[5], one[5] = {1, 1, 1, 1, 1};
    gelu_forward(out, extremes, 5);
    gelu_backward(slope, one, extremes, 5);
    test.that(out[0] == 0 && out[1] == 0 && out[2] == 30 && out[3] == 1e4f && std::isnan(out[4]), "extremes");
    test.that(slope[0] == 0 && slope[1] == 0 && slope[2] == 1 && slope[3] == 1 && std::isnan(slope[4]), "their slopes");
}

static void test_crossentropy(int64_t N, int V, int Vp, double scale) {
    Test test(text("crossentropy N %d V %d Vp %d logits %g", (int)N, V, Vp, scale));
    Doubles logits = random_numbers(N * Vp, scale);
    std::vector<int> targets(N);
    for (int64_t i = 0; i < N; i++) targets[i] = i % 3 == 1 ? -1 : i == 0 ? V - 1 : (int)(uniform() * V);
    const double dloss = 0.375;
    auto forward = [&] {
        Doubles losses(N);
        for (int64_t i = 0; i < N; i++) {
            const double* x = &logits[i * Vp];
            double sum = 0, top = *std::max_element(x, x + V);
            if (targets[i] < 0) continue;
            for (int v = 0; v < V; v++) sum += exp(x[v] - top);
            losses[i] = log(sum) + top - x[targets[i]];
        }
        return losses;
    };
    auto run = [&](auto zero) -> Results {
        typedef decltype(zero) R;
        std::vector<R> x = to<R>(logits), losses = poison<R>(N), again = poison<R>(N);
        crossentropy_forward_backward(x.data(), again.data(), targets.data(), (R)dloss, N, V, Vp, false);
        test.that(x == to<R>(logits), "logits kept");
        crossentropy_forward_backward(x.data(), losses.data(), targets.data(), (R)dloss, N, V, Vp, true);
        test.that(losses == again, "same losses");
        bool zeros = true;
        for (int64_t i = 0; i < N * Vp; i++) zeros = zeros && ((i % Vp < V && targets[i / Vp] >= 0) || x[i] == 0);
        test.that(zeros, "zeros where no gradient is");
        return {wide(losses), wide(x)};
    };
    Results d = run(0.0), f = run(0.0f);
    test.value("losses", d[0], f[0], forward());
    test.gradient("dlogits", d[1], f[1], {}, logits, [&] {
        double sum = 0;
        for (double loss : forward()) sum += dloss * loss;
        return sum;
    });
}

static void test_sums(int64_t n) {
    Test test(text("sum_squares, sum_losses n %d", (int)n));
    Doubles x = random_numbers(n, 1, 1);
    std::vector<float> xf = to<float>(x);
    long double squares = 0, sum = 0;
    for (double value : x) { squares += (long double)value * value; sum += value; }
    double totals[2] = {1000, -3};  // they are added to
    sum_squares(&totals[0], xf.data(), n);
    sum_losses(&totals[1], xf.data(), n);
    test.at_most("squares", fabs(totals[0] / (double)(squares + 1000) - 1), DOUBLE_BOUND);
    test.at_most("losses", fabs(totals[1] / (double)(sum - 3) - 1), DOUBLE_BOUND);
}

static void test_adamw(int64_t n, bool with_master, double weight_decay, double grad_scale) {
    Test test(text("adamw n %d%s decay %g scale %g", (int)n, with_master ? " master" : "", weight_decay, grad_scale));
    const double lr = 0.0078125, beta1 = 0.875, beta2 = 0.9375, eps = 0x1p-20;  // exact in fp32 too
    Doubles p = random_numbers(n), m(n), v(n), grads[3];
    for (Doubles& g : grads) g = random_numbers(n);
    auto run = [&](auto zero) -> Results {
        typedef decltype(zero) R;
        std::vector<R> params = with_master ? poison<R>(n) : to<R>(p), master = to<R>(p), mr = to<R>(m), vr = to<R>(v);
        for (int t = 1; t <= 3; t++) {
            std::vector<R> g = to<R>(grads[t - 1]);
            adamw_update(params.data(), with_master ? master.data() : NULL, mr.data(), vr.data(), g.data(), n,
                         {(float)lr, (float)beta1, (float)beta2, (float)(1 - pow(beta1, t)), (float)(1 - pow(beta2, t)),
                          (float)eps, (float)weight_decay, (float)grad_scale});
        }
        if (with_master) test.that(params == master, "params are the master's");
        return {wide(params), wide(mr), wide(vr)};
    };
    Results d = run(0.0), f = run(0.0f);
    for (int64_t i = 0; i < n; i++) {
        for (int t = 1; t <= 3; t++) {
            double g = grads[t - 1][i] * grad_scale;
            m[i] += (1 - beta1) * (g - m[i]);
            v[i] += (1 - beta2) * (g * g - v[i]);
            double mhat = m[i] / (1 - pow(beta1, t)), vhat = v[i] / (1 - pow(beta2, t));
            p[i] = p[i] - lr * (mhat / (sqrt(vhat) + eps) + weight_decay * p[i]);
        }
    }
    test.value("params", d[0], f[0], p);
    test.value("m", d[1], f[1], m);
    test.value("v", d[2], f[2], v);
}

// ---- rotary positions -----------------------------------------------------------------------------------------

static void rotate_plainly(double* x, double position, double direction, int D, double theta) {
    for (int d = 0; d < D / 2; d++) {
        double angle = direction * position / pow(theta, 2.0 * d / D), re = x[d], im = x[d + D / 2];
        x[d] = re * cos(angle) - im * sin(angle);
        x[d + D / 2] = re * sin(angle) + im * cos(angle);
    }
}

static void test_rope(int B, int64_t T, int H, int D, double theta, int64_t t0) {
    Test test(text("rope B %d T %d H %d D %d theta %g t0 %d", B, (int)T, H, D, theta, (int)t0));
    size_t n = B * T * 3 * H * D;
    Doubles qkv = random_numbers(n), dout = random_numbers(n);
    auto run = [&](auto zero) -> Results {
        typedef decltype(zero) R;
        std::vector<R> table = poison<R>((1024 + (t0 + T + 1023) / 1024) * D), x = to<R>(qkv), dx = to<R>(dout);
        rope_table(table.data(), t0 + T, D, theta);
        rope_rotate(x.data(), table.data(), 1, B, T, H, D, t0);
        rope_rotate(dx.data(), table.data(), -1, B, T, H, D, t0);
        std::vector<R> back = x;
        rope_rotate(back.data(), table.data(), -1, B, T, H, D, t0);
        return {wide(x), wide(dx), wide(back)};
    };
    Results d = run(0.0), f = run(0.0f);
    Doubles expected = qkv;
    for (size_t row = 0; row < n / D; row++) {
        if (row / H % 3 < 2) rotate_plainly(&expected[row * D], t0 + (row / H / 3) % T, 1, D, theta);
    }
    test.value("rotated", d[0], f[0], expected);
    test.value("turned back", d[2], f[2], qkv);
    test.at_most("backward is the transpose", fabs(dot(d[0], dout) - dot(qkv, d[1])) / sqrt((double)n), DOUBLE_BOUND);
}

static void test_heads_pack(int B, int64_t R, int W, int n) {
    Test test(text("heads_pack B %d R %d W %d n %d", B, (int)R, W, n));
    Doubles rows = random_numbers(B * R * W * n), packed(rows.size());
    for (size_t i = 0; i < rows.size(); i++) {  // element i is (b, r, w, k)
        size_t k = i % n, w = i / n % W, r = i / n / W % R, b = i / n / W / R;
        packed[((b * W + w) * R + r) * n + k] = rows[i];
    }
    auto run = [&](auto zero) -> Results {
        typedef decltype(zero) Real;
        std::vector<Real> x = to<Real>(rows), y = poison<Real>(x.size()), back = poison<Real>(x.size());
        heads_pack(y.data(), x.data(), B, R, W, n);
        heads_unpack(back.data(), y.data(), B, R, W, n);
        return {wide(y), wide(back)};
    };
    Results d = run(0.0), f = run(0.0f);
    test.that(d[0] == packed && f[0] == packed, "packed");
    test.that(d[1] == rows && f[1] == rows, "unpacked");
}

static void test_rope_far() {  // the table at positions of a million
    Test test("rope table T 2097152 D 8");
    const int64_t T = 1 << 21;
    const int D = 8;
    std::vector<float> table((1024 + T / 1024) * D);
    rope_table(table.data(), T, D, 10000);
    double worst = 0;
    for (int64_t position = 0; position < T; position += 997) {
        float x[D] = {1, 1, 1, 1, 0, 0, 0, 0};
        double y[D] = {1, 1, 1, 1, 0, 0, 0, 0};
        cpu::rope_turn(x, table.data(), position, 1, D);
        rotate_plainly(y, position, 1, D, 10000);
        for (int d = 0; d < D; d++) worst = std::max(worst, fabs(x[d] - y[d]));
    }
    test.at_most("absolute error", worst, 5e-7);
}

// ---- causal attention -----------------------------------------------------------------------------------------

static void attention_plainly(Doubles* out /*(B,T,H,D)*/, Doubles* stats /*(B,H,T)*/, const Doubles& qkv,
                              int B, int64_t T, int H, int D) {
    out->assign(B * T * H * D, 0);
    stats->assign(B * H * T, 0);
    #pragma omp parallel for schedule(dynamic)
    for (int64_t job = 0; job < B * H * T; job++) {
        int64_t b = job / T / H, h = job / T % H, i = job % T;
        auto row = [&](int64_t part, int64_t t) { return &qkv[(((b * T + t) * 3 + part) * H + h) * D]; };
        Doubles score(i + 1);
        double top = -INFINITY, sum = 0;
        for (int64_t j = 0; j <= i; j++) {
            for (int d = 0; d < D; d++) score[j] += row(0, i)[d] * row(1, j)[d] / sqrt((double)D);
            top = std::max(top, score[j]);
        }
        for (double x : score) sum += exp(x - top);
        (*stats)[job] = top + log(sum);
        for (int64_t j = 0; j <= i; j++) {
            double p = exp(score[j] - top) / sum;
            for (int d = 0; d < D; d++) (*out)[((b * T + i) * H + h) * D + d] += p * row(2, j)[d];
        }
    }
}

// Both builds' attention and its backward: out, stats, dqkv.
template <typename R>
static Results attention(const Doubles& qkv, const Doubles& dout, int B, int64_t T, int H, int D) {
    std::vector<R> x = to<R>(qkv), out = poison<R>(dout.size()), stats = poison<R>(B * H * T), dy = to<R>(dout);
    std::vector<R> dx = poison<R>(qkv.size());
    sdpa_forward(out.data(), stats.data(), x.data(), B, T, H, D);
    sdpa_backward(dx.data(), dy.data(), x.data(), out.data(), stats.data(), B, T, H, D);
    return {wide(out), wide(stats), wide(dx)};
}

static void test_attention(int B, int64_t T, int H, int D, double scale) {
    Test test(text("attention B %d T %d H %d D %d q, k, v of size %g", B, (int)T, H, D, scale));
    Doubles qkv = random_numbers(B * T * 3 * H * D, scale), dout = random_numbers(B * T * H * D), out, stats;
    Results d = attention<double>(qkv, dout, B, T, H, D), f = attention<float>(qkv, dout, B, T, H, D);
    attention_plainly(&out, &stats, qkv, B, T, H, D);
    // A score of size s has an fp32 error of 6e-8 s, which the exponential turns into a relative one.
    double float_bound = FLOAT_BOUND * std::max(1.0, scale);
    test.value("out", d[0], f[0], out, float_bound);
    test.value("stats", d[1], f[1], stats);
    auto loss = [&] {
        attention_plainly(&out, &stats, qkv, B, T, H, D);
        return dot(out, dout);
    };
    test.gradient("dqkv", d[2], f[2], {}, qkv, loss, float_bound);
}

static void test_attention_long() {
    Test test("attention B 1 T 3000 H 1 D 32, fp32 against double");
    Doubles qkv = random_numbers(3000 * 3 * 32), dout = random_numbers(3000 * 32);
    auto run = [&] { return attention<float>(qkv, dout, 1, 3000, 1, 32); };
    Results d = attention<double>(qkv, dout, 1, 3000, 1, 32), f = run();
    const char* names[3] = {"out", "stats", "dqkv"};
    for (int i = 0; i < 3; i++) test.at_most(names[i], distance(f[i], d[i]), FLOAT_BOUND);
    test.that(run() == f, "the same bits in another run");
    #ifdef _OPENMP
    int threads = omp_get_max_threads();
    omp_set_num_threads(threads == 1 ? 2 : 1);
    test.that(run() == f, "and with another number of threads");
    omp_set_num_threads(threads);
    #endif
}

// ---- Lighthouse -----------------------------------------------------------------------------------------------

static LighthouseShape shape_of(int64_t T, int H, int D, int levels, int pool, int topk, int tile) {
    LighthouseShape s;
    end_if(lighthouse_shape(&s, T, H, D, levels, pool, topk, tile));
    return s;
}

static int level_of(int64_t flat, const LighthouseShape& s) {
    int level = 0;
    while (flat >= s.off[level + 1]) level++;
    return level;
}
static int64_t width_of(int level, const LighthouseShape& s) { return s.T / s.n[level]; }
static int64_t window_end(int64_t flat, const LighthouseShape& s) {
    int level = level_of(flat, s);
    return (flat - s.off[level] + 1) * width_of(level, s) - 1;
}

// The selection as the definition reads: a candidate is picked when fewer than m/2 others beat it; then everything is
// sorted by the end of its window, finer levels first.
static Ints select_plainly(const Doubles& scores, int B, const LighthouseShape& s) {
    Ints index;
    int64_t E = s.off[s.levels];
    for (int64_t bh = 0; bh < B * s.H; bh++) {
        Ints present;
        for (int64_t tile = 0; tile < s.tiles; tile++) {
            std::vector<int64_t> candidates;
            for (int64_t i = 0; i < s.n[s.levels - 1]; i++) {
                if (i * s.tiles / s.n[s.levels - 1] == tile) candidates.push_back(s.off[s.levels - 1] + i);
            }
            for (int level = s.levels - 1; level > 0; level--) {
                std::vector<bool> picked(candidates.size());
                for (int part = 0; part < 2; part++) {
                    const double* score = &scores[(part * B * s.H + bh) * E];
                    std::vector<bool> before = picked;
                    for (size_t x = 0; x < candidates.size(); x++) {
                        int beaten = 0;
                        for (size_t y = 0; y < candidates.size(); y++) {
                            double difference = score[candidates[y]] - score[candidates[x]];
                            if (!before[y] && (difference > 0 || (difference == 0 && y < x))) beaten++;
                        }
                        if (!before[x] && beaten < s.tile / 2) picked[x] = true;
                    }
                }
                std::vector<int64_t> children;
                for (size_t x = 0; x < candidates.size(); x++) {
                    present.push_back((int32_t)candidates[x]);
                    int64_t first = s.off[level - 1] + (candidates[x] - s.off[level]) * s.pool;
                    for (int c = 0; picked[x] && c < s.pool; c++) children.push_back(first + c);
                }
                candidates = children;
            }
            present.insert(present.end(), candidates.begin(), candidates.end());
        }
        std::sort(present.begin(), present.end(), [&](int32_t x, int32_t y) {
            int64_t ex = window_end(x, s), ey = window_end(y, s);
            return ex < ey || (ex == ey && x < y);  // a finer level has the lower flat index
        });
        index.insert(index.end(), present.begin(), present.end());
    }
    return index;
}

// Scores from the norms of all tokens that an entry covers.
static Doubles score_plainly(const Doubles& qkv, int B, const LighthouseShape& s) {
    Doubles scores;
    for (int64_t part = 0; part < 2; part++) {
        for (int64_t bh = 0; bh < B * s.H; bh++) {
            for (int64_t e = 0; e < s.off[s.levels]; e++) {
                double top = 0;
                for (int64_t w = 0, t = window_end(e, s); w < width_of(level_of(e, s), s); w++, t--) {
                    const double* x = &qkv[(((bh / s.H * s.T + t) * 3 + part) * s.H + bh % s.H) * s.D];
                    double square = 0;
                    for (int d = 0; d < s.D; d++) square += x[d] * x[d];
                    top = std::max(top, sqrt(square));
                }
                scores.push_back(top);
            }
        }
    }
    return scores;
}

// Of entry index[i]: batch, head, slot; the first and the last token that it covers.
struct Slot { int64_t b, h, r, first, last; };
static Slot slot_at(int64_t i, const Ints& index, const LighthouseShape& s) {
    int64_t last = window_end(index[i], s);
    return {i / s.S / s.H, i / s.S % s.H, i % s.S, last - width_of(level_of(index[i], s), s) + 1, last};
}

static Doubles gather_plainly(const Doubles& qkv, const Ints& index, double theta, int B, const LighthouseShape& s) {
    Doubles slots(B * s.S * 3 * s.H * s.D);
    for (size_t i = 0; i < index.size(); i++) {
        Slot e = slot_at(i, index, s);
        for (int64_t part = 0; part < 3; part++) {
            double* x = &slots[(((e.b * s.S + e.r) * 3 + part) * s.H + e.h) * s.D];
            for (int64_t t = e.first; t <= e.last; t++) {
                const double* token = &qkv[(((e.b * s.T + t) * 3 + part) * s.H + e.h) * s.D];
                for (int d = 0; d < s.D; d++) x[d] += token[d] / (e.last - e.first + 1);
            }
            if (theta > 0 && part < 2) rotate_plainly(x, e.last, 1, s.D, theta);
        }
    }
    return slots;
}

// Every slot adds itself to its tokens.
static Doubles scatter_plainly(const Doubles& attn, const Ints& index, int B, const LighthouseShape& s) {
    Doubles out(B * s.T * s.H * s.D);
    for (size_t i = 0; i < index.size(); i++) {
        Slot e = slot_at(i, index, s);
        const double* x = &attn[((e.b * s.S + e.r) * s.H + e.h) * s.D];
        for (int64_t t = e.last; t <= std::min(2 * e.last - e.first, s.T - 1); t++) {
            for (int d = 0; d < s.D; d++) out[((e.b * s.T + t) * s.H + e.h) * s.D + d] += x[d];
        }
    }
    return out;
}

static Doubles lighthouse_plainly(const Doubles& qkv, const Ints& index, double theta, int B,
                                  const LighthouseShape& s) {
    Doubles attn, stats;
    attention_plainly(&attn, &stats, gather_plainly(qkv, index, theta, B, s), B, s.S, s.H, s.D);
    return scatter_plainly(attn, index, B, s);
}

// The whole operation and its backward. An empty index is filled by the selection made here.
struct Lighthouse { Doubles scores, slots, attn, out, dattn, dslots, dqkv; };
template <typename R>
static Lighthouse lighthouse(const Doubles& qkv, const Doubles& dout, Ints* index, double theta, int B,
                             const LighthouseShape& s) {
    size_t n = B * s.T * s.H * s.D, rows = B * s.S * s.H * s.D, entries = B * s.H * s.off[s.levels];
    std::vector<R> x = to<R>(qkv), dy = to<R>(dout), table((1024 + (s.T + 1023) / 1024) * s.D);
    std::vector<R> scores = poison<R>(2 * entries), slots = poison<R>(3 * rows), attn = poison<R>(rows);
    std::vector<R> stats = poison<R>(B * s.H * s.S), out = poison<R>(n);
    std::vector<R> dattn = poison<R>(rows), dslots = poison<R>(3 * rows), dx = poison<R>(3 * n);
    Ints slot(entries, -77);
    const R* rope = theta > 0 ? table.data() : NULL;
    if (rope) rope_table(table.data(), s.T, s.D, theta);
    lighthouse_scores(scores.data(), x.data(), B, &s);
    if (index->empty()) {
        index->assign(B * s.H * s.S, -77);
        lighthouse_select(index->data(), scores.data(), B, &s);
    }
    cpu::lighthouse_invert(slot.data(), index->data(), B, &s);
    lighthouse_gather(slots.data(), x.data(), index->data(), rope, B, &s, 0);
    sdpa_forward(attn.data(), stats.data(), slots.data(), B, s.S, s.H, s.D);
    lighthouse_scatter(out.data(), attn.data(), NULL, slot.data(), B, &s);
    lighthouse_scatter_backward(dattn.data(), dy.data(), NULL, index->data(), B, &s);
    sdpa_backward(dslots.data(), dattn.data(), slots.data(), attn.data(), stats.data(), B, s.S, s.H, s.D);
    lighthouse_gather_backward(dx.data(), dslots.data(), slot.data(), rope, B, &s, 0, false);
    return {wide(scores), wide(slots), wide(attn), wide(out), wide(dattn), wide(dslots), wide(dx)};
}

static void check_selection(Test* test, const Ints& index, int B, const LighthouseShape& s) {
    bool once = true, ordered = true, families = true, quota = true;
    for (int64_t bh = 0; bh < B * s.H; bh++) {
        std::vector<int> seen(s.off[s.levels]);
        for (int64_t r = 0; r < s.S; r++) {
            int64_t e = index[bh * s.S + r], before = r > 0 ? index[bh * s.S + r - 1] : 0;
            if (e < 0 || e >= s.off[s.levels]) return test->that(false, "entries are entries");
            seen[e]++;
            int64_t step = r > 0 ? window_end(e, s) - window_end(before, s) : 1;
            ordered = ordered && (step > 0 || (step == 0 && level_of(before, s) < level_of(e, s)));
        }
        for (int count : seen) once = once && count <= 1;
        for (int level = s.levels - 1; level > 0; level--) {
            std::vector<int> expanded(s.tiles);  // entries of the level with children in the sequence
            for (int64_t i = 0; i < s.n[level]; i++) {
                int children = 0;
                for (int c = 0; c < s.pool; c++) children += seen[s.off[level - 1] + i * s.pool + c];
                families = families && (children == 0 || (children == s.pool && seen[s.off[level] + i]));
                families = families && (level < s.levels - 1 || seen[s.off[level] + i]);
                expanded[i * s.tiles / s.n[level]] += children == s.pool;
            }
            for (int count : expanded) quota = quota && count == s.tile;
        }
    }
    test->that(once, "each entry once");
    test->that(ordered, "in order of window ends");
    test->that(families, "children come together and with their parents");
    test->that(quota, "m expanded per tile and level");
}

static std::string lighthouse_name(const char* what, int B, const LighthouseShape& s, double theta) {
    return text("%s B %d T %d H %d D %d L %d p %d k %d m %d%s", what, B, (int)s.T, s.H, s.D, s.levels, s.pool, s.topk,
                s.tile, theta > 0 ? " rope" : "");
}

static void test_lighthouse(int B, const LighthouseShape& s, double theta) {
    Test test(lighthouse_name("lighthouse", B, s, theta));
    size_t n = B * s.T * s.H * s.D, E = s.off[s.levels];
    Doubles qkv = random_numbers(3 * n), dout = random_numbers(n);
    Ints index, slot(B * s.H * E, -77);
    Lighthouse f = lighthouse<float>(qkv, dout, &index, theta, B, s);
    Lighthouse d = lighthouse<double>(qkv, dout, &index, theta, B, s);
    test.value("scores", d.scores, f.scores, score_plainly(qkv, B, s));
    test.that(index == select_plainly(f.scores, B, s), "selection");
    check_selection(&test, index, B, s);
    cpu::lighthouse_invert(slot.data(), index.data(), B, &s);
    size_t inverse = 0, filled = 0;
    for (size_t i = 0; i < index.size(); i++) inverse += slot[i / s.S * E + index[i]] == (int32_t)(i % s.S);
    for (int32_t r : slot) filled += r != -1;
    test.that(inverse == index.size() && filled == inverse, "inverse");
    test.value("slots", d.slots, f.slots, gather_plainly(qkv, index, theta, B, s));
    test.value("out", d.out, f.out, lighthouse_plainly(qkv, index, theta, B, s));
    // Gather and scatter are linear: their backwards are their transposes.
    test.at_most("scatter's transpose", fabs(dot(d.out, dout) - dot(d.attn, d.dattn)) / sqrt((double)n), DOUBLE_BOUND);
    test.at_most("gather's", fabs(dot(d.slots, d.dslots) - dot(qkv, d.dqkv)) / sqrt((double)n), DOUBLE_BOUND);
    auto loss = [&] { return dot(lighthouse_plainly(qkv, index, theta, B, s), dout); };
    test.gradient("dqkv", d.dqkv, f.dqkv, {}, qkv, loss);
}

// What each operation gives over sequences, or over the part of them that begins at token t0.
struct Part { Ints index, slot; Floats slots, out, dattn, dqkv; };
static Part run_part(const Floats& qkv, const Floats& attn, const Floats& dout, const Floats& dslots,
                     const Floats& halo, const Floats& dout_halo, const Floats& table, int B, const LighthouseShape& s,
                     int64_t t0) {
    auto pointer = [](const Floats& x) { return x.empty() ? NULL : x.data(); };
    size_t heads = B * s.H, E = s.off[s.levels];
    Floats scores = poison<float>(2 * heads * E);
    Part y = {Ints(heads * s.S, -77), Ints(heads * E, -77), poison<float>(dslots.size()), poison<float>(dout.size()),
              poison<float>(attn.size()), poison<float>(qkv.size())};
    lighthouse_scores(scores.data(), qkv.data(), B, &s);
    lighthouse_select(y.index.data(), scores.data(), B, &s);
    cpu::lighthouse_invert(y.slot.data(), y.index.data(), B, &s);
    lighthouse_gather(y.slots.data(), qkv.data(), y.index.data(), pointer(table), B, &s, t0);
    lighthouse_scatter(y.out.data(), attn.data(), pointer(halo), y.slot.data(), B, &s);
    lighthouse_scatter_backward(y.dattn.data(), dout.data(), pointer(dout_halo), y.index.data(), B, &s);
    lighthouse_gather_backward(y.dqkv.data(), dslots.data(), y.slot.data(), pointer(table), B, &s, t0, false);
    return y;
}

// Rows [first, first + count) of each of B sequences, of x (B, rows, n).
static Floats cut(const Floats& x, int B, int64_t rows, int64_t first, int64_t count) {
    int64_t n = x.size() / B / rows;
    Floats y;
    for (int b = 0; b < B; b++) y.insert(y.end(), &x[(b * rows + first) * n], &x[(b * rows + first) * n] + count * n);
    return y;
}

// Sequences cut into W parts of whole tiles, as context parallelism cuts them: each part works by itself but for the
// halos, and what comes out is what whole sequences give, bit for bit.
static void test_parts(int B, const LighthouseShape& s, int W, double theta) {
    Test test(lighthouse_name(text("%d parts,", W).c_str(), B, s, theta));
    LighthouseShape p = shape_of(s.T / W, s.H, s.D, s.levels, s.pool, s.topk / W, s.tile);
    int64_t C = (int64_t)s.H * s.D, L = s.levels, reach = s.T / s.n[L - 1] - 1;
    Floats qkv = to<float>(random_numbers(B * s.T * 3 * C)), attn = to<float>(random_numbers(B * s.S * C));
    Floats dslots = to<float>(random_numbers(B * s.S * 3 * C)), dout = to<float>(random_numbers(B * s.T * C));
    Floats table, halo;
    if (theta > 0) {
        table.resize((1024 + (s.T + 1023) / 1024) * s.D);
        rope_table(table.data(), s.T, s.D, theta);
    }
    Part whole = run_part(qkv, attn, dout, dslots, {}, {}, table, B, s, 0);
    for (int w = 0; w < W; w++) {
        Floats dout_halo, part_attn = cut(attn, B, s.S, w * p.S, p.S);
        if (w + 1 < W) dout_halo = cut(dout, B, s.T, (w + 1) * p.T, reach);
        Part y = run_part(cut(qkv, B, s.T, w * p.T, p.T), part_attn, cut(dout, B, s.T, w * p.T, p.T),
                          cut(dslots, B, s.S, w * p.S, p.S), halo, dout_halo, table, B, p, w * p.T);
        bool selection = true;
        for (size_t i = 0; i < y.index.size(); i++) {
            int64_t level = level_of(y.index[i], p), e = y.index[i] - p.off[level] + w * p.n[level];
            selection = selection && whole.index[i / p.S * s.S + w * p.S + i % p.S] == s.off[level] + e;
        }
        test.that(selection, "selection");
        test.that(y.slots == cut(whole.slots, B, s.S, w * p.S, p.S), "slots");
        test.that(y.out == cut(whole.out, B, s.T, w * p.T, p.T), "out");
        test.that(y.dattn == cut(whole.dattn, B, s.S, w * p.S, p.S), "dattn");
        test.that(y.dqkv == cut(whole.dqkv, B, s.T, w * p.T, p.T), "dqkv");
        halo = poison<float>(B * (L - 1) * C);  // of this part, for the next
        lighthouse_halo(halo.data(), part_attn.data(), y.slot.data(), B, &p);
    }
}

// Selection from scores that tie, that are all equal, or that are not numbers.
static void test_selection(int B, const LighthouseShape& s) {
    Test test(lighthouse_name("selection", B, s, 0));
    int64_t E = s.off[s.levels], count = 2 * B * s.H * E;
    for (int values : {1, 2, 5, 1000000}) {
        Doubles scores(count);
        for (double& x : scores) x = (int)(uniform() * values);
        std::vector<float> in_float = to<float>(scores);
        Ints index(B * s.H * s.S, -77);
        lighthouse_select(index.data(), in_float.data(), B, &s);
        test.that(index == select_plainly(scores, B, s), text("%d different scores", values));
    }
    std::vector<float> broken(count, NAN);
    for (int64_t i = 0; i < count; i += 3) broken[i] = (float)uniform();
    Ints index(B * s.H * s.S, -77);
    lighthouse_select(index.data(), broken.data(), B, &s);
    check_selection(&test, index, B, s);
    Doubles highest = wide(broken);
    for (double& x : highest) x = std::isnan(x) ? 2 : x;  // above every other
    test.that(index == select_plainly(highest, B, s), "NaN counts as the highest");

    std::vector<float> qkv(B * s.T * 3 * s.H * s.D, 1), norms(count);
    int64_t token = 3 * s.H * s.D;
    for (int64_t t : {0, s.pool + 1}) qkv[t * token] = NAN;                         // the first of its entry, and the second
    for (int64_t t = 2 * s.pool; t < 3 * s.pool; t++) qkv[t * token] = NAN;         // and all of the third
    lighthouse_scores(norms.data(), qkv.data(), B, &s);
    const float* entries = &norms[s.off[1]];
    test.that(entries[0] == norms[1] && entries[1] == norms[1] && std::isnan(entries[2]), "an entry's score is NaN only where all of it are");
}

// A change of token t must not reach outputs before it. The selection is made anew each time. Where it stays the same,
// nothing before t may change; where the new norms change it, nothing before the token's tile: the tile's quota is
// shared by all its entries, early and late, which is how the algorithm is defined.
static void test_causality(int B, const LighthouseShape& s, double theta) {
    Test test(lighthouse_name("causality", B, s, theta));
    size_t row = s.H * s.D, n = B * s.T * row;
    Doubles qkv = random_numbers(3 * n), dout(n);
    Ints index;
    Doubles out = lighthouse<float>(qkv, dout, &index, theta, B, s).out;
    bool past_kept = true, earlier_tiles_kept = true, other_batches_kept = true, own_reached = true;
    int same = 0, other = 0;
    for (int trial = 0; trial < 24; trial++) {
        int64_t t = trial == 0 ? 0 : trial == 1 ? s.T - 1 : (int64_t)(uniform() * s.T), b = trial % B;
        Doubles changed = qkv, noise = random_numbers(3 * row, 2);
        for (size_t i = 0; i < 3 * row; i++) {  // even trials keep the norms: q and k are negated
            double& x = changed[(b * s.T + t) * 3 * row + i];
            x = trial % 2 == 0 && i < 2 * row ? -x : noise[i];
        }
        Ints index2;
        Doubles out2 = lighthouse<float>(changed, dout, &index2, theta, B, s).out;
        (index2 == index ? same : other)++;
        int64_t tile = s.T / s.tiles, kept = index2 == index ? t : t / tile * tile;
        bool before = true, reached = false;
        for (size_t i = 0; i < n; i++) {
            int64_t token = i / row % s.T, batch = i / row / s.T;
            if (batch != b) other_batches_kept = other_batches_kept && out2[i] == out[i];
            else if (token < kept) before = before && out2[i] == out[i];
            else reached = reached || out2[i] != out[i];
        }
        (index2 == index ? past_kept : earlier_tiles_kept) &= before;
        own_reached = own_reached && reached;
    }
    test.that(past_kept, text("nothing before the token (%d changes)", same));
    test.that(earlier_tiles_kept, text("nothing before its tile (%d changes of the selection)", other));
    test.that(other_batches_kept, "no other sequence");
    test.that(own_reached && same >= 12, "something after it");
}

// With L = 2 and k = n_1 everything is expanded: the output at t depends on the values of exactly the tokens up to t.
static void test_full_expansion(const LighthouseShape& s, double theta) {
    Test test(lighthouse_name("full expansion", 1, s, theta));
    size_t n = s.T * s.H * s.D;
    Doubles qkv = random_numbers(3 * n);
    Ints index;
    bool complete = true, past = true, future = true;
    for (int64_t t = 0; t < s.T; t += t < 9 ? 1 : 13) {
        Doubles dout(n);
        for (int i = 0; i < s.H * s.D; i++) dout[t * s.H * s.D + i] = 1;
        Doubles dqkv = lighthouse<double>(qkv, dout, &index, theta, 1, s).dqkv;
        for (int64_t j = 0; j < s.T; j++) {
            for (int i = 0; i < s.H * s.D; i++) {
                double reached = dqkv[(j * 3 + 2) * s.H * s.D + i];
                (j <= t ? past : future) &= j <= t ? reached > 0 : reached == 0;
            }
        }
    }
    for (int64_t h = 0; h < s.H; h++) {
        std::vector<bool> seen(s.off[2]);
        for (int64_t r = 0; r < s.S; r++) seen[index[h * s.S + r]] = true;
        for (bool entry : seen) complete = complete && entry;
    }
    test.that(complete && s.S == s.off[2], "every entry of both levels present");
    test.that(past, "each token attends to itself and its past");
    test.that(future, "to nothing else");
}

// ---- Causal Lighthouse ----------------------------------------------------------------------------------------

// The leaves as their definition reads: entries of the selection whose first child is none, tile by tile by their first
// token.
static Ints leaves_plainly(const Ints& index, int B, const LighthouseShape& s) {
    Ints leaves;
    for (int64_t bh = 0; bh < B * s.H; bh++) {
        std::vector<bool> selected(s.off[s.levels]);
        for (int64_t r = 0; r < s.S; r++) selected[index[bh * s.S + r]] = true;
        std::vector<std::pair<int64_t, int32_t>> found;
        for (int64_t e = 0; e < s.off[s.levels]; e++) {
            int level = level_of(e, s);
            int64_t child = level ? s.off[level - 1] + (e - s.off[level]) * s.pool : -1;
            if (selected[e] && !(level && selected[child]))
                found.push_back({(e - s.off[level]) * (s.T / s.n[level]), (int32_t)e});
        }
        std::sort(found.begin(), found.end());
        for (auto& leaf : found) leaves.push_back(leaf.second);
    }
    return leaves;
}

// Every token asks, in one softmax, the tokens of its tile up to itself and the leaves of earlier tiles, each the mean
// of the tokens that it covers.
static Doubles causal_plainly(Doubles* stats /*(B,H,T) or NULL*/, const Doubles& qkv, const Ints& leaves, int B,
                              const LighthouseShape& s) {
    LighthouseShape leaf = leaf_shape(&s);
    int64_t w = s.T / s.tiles;
    int D = s.D;
    Doubles out(B * s.T * s.H * D);
    for (int64_t bh = 0; bh < B * s.H; bh++) {
        auto token = [&](int64_t part, int64_t t) {
            return &qkv[(((bh / s.H * s.T + t) * 3 + part) * s.H + bh % s.H) * D];
        };
        struct Seen { int64_t first, last; Doubles k, v; };  // of the tokens, or of a slot those that it covers
        std::vector<Seen> all;
        auto add = [&](int64_t first, int64_t last) {
            Seen x = {first, last, Doubles(D), Doubles(D)};
            for (int64_t t = first; t <= last; t++) {
                for (int d = 0; d < D; d++) x.k[d] += token(1, t)[d] / (last - first + 1);
                for (int d = 0; d < D; d++) x.v[d] += token(2, t)[d] / (last - first + 1);
            }
            all.push_back(x);
        };
        for (int64_t r = 0; r < leaf.S; r++) {
            Slot e = slot_at(bh * leaf.S + r, leaves, leaf);
            add(e.first, e.last);
        }
        for (int64_t t = 0; t < s.T; t++) add(t, t);
        for (int64_t t = 0; t < s.T; t++) {
            Doubles weight(all.size());
            double sum = 0;
            for (size_t j = 0; j < all.size(); j++) {
                const Seen& x = all[j];
                bool slot = (int64_t)j < leaf.S, seen = slot ? x.last < t / w * w : x.first >= t / w * w && x.first <= t;
                double logit = 0;
                for (int d = 0; d < D; d++) logit += token(0, t)[d] * x.k[d] / sqrt((double)D);
                if (seen) sum += weight[j] = exp(logit);
            }
            if (stats) (*stats)[bh * s.T + t] = log(sum);
            double* y = &out[((bh / s.H * s.T + t) * s.H + bh % s.H) * D];
            for (size_t j = 0; j < all.size(); j++)
                for (int d = 0; d < D && weight[j] > 0; d++) y[d] += weight[j] / sum * all[j].v[d];
        }
    }
    return out;
}

// The whole operation and its backward. Empty leaves are filled by the selection made here.
template <typename R>
static Results causal(const Doubles& qkv, const Doubles& dout, Ints* leaves, int B, const LighthouseShape& s) {
    LighthouseShape leaf = leaf_shape(&s);
    size_t entries = B * s.H * s.off[s.levels], rows = B * leaf.S * 3 * s.H * s.D;
    std::vector<R> x = to<R>(qkv), dy = to<R>(dout), scores = poison<R>(2 * entries), slots = poison<R>(rows);
    std::vector<R> out = poison<R>(dout.size()), stats = poison<R>(B * s.H * s.T);
    std::vector<R> dx = poison<R>(qkv.size()), dslots = poison<R>(rows);
    Ints index(B * s.H * s.S, -77), slot(entries, -77);
    if (leaves->empty()) {
        leaves->assign(B * s.H * leaf.S, -77);
        lighthouse_scores(scores.data(), x.data(), B, &s);
        lighthouse_select(index.data(), scores.data(), B, &s);
        cpu::lighthouse_invert(slot.data(), index.data(), B, &s);
        cpu::lighthouse_leaves(leaves->data(), index.data(), slot.data(), B, &s);
    }
    lighthouse_gather(slots.data(), x.data(), leaves->data(), (R*)NULL, B, &leaf, 0);
    causal_forward(out.data(), stats.data(), x.data(), slots.data(), B, &s);
    causal_backward(dx.data(), dslots.data(), dy.data(), x.data(), slots.data(), out.data(), stats.data(), B, &s);
    bool zeros = true;  // a slot has no query
    for (size_t i = 0; i < rows; i++) zeros = zeros && (i / (s.H * s.D) % 3 || dslots[i] == 0);
    cpu::lighthouse_invert(slot.data(), leaves->data(), B, &leaf);
    lighthouse_gather_backward(dx.data(), dslots.data(), slot.data(), (R*)NULL, B, &leaf, 0, true);
    return {wide(out), wide(stats), wide(dx), {(double)zeros}};
}

static void check_leaves(Test* test, const Ints& leaves, int B, const LighthouseShape& s) {
    LighthouseShape leaf = leaf_shape(&s);
    bool once = true, counts = true;
    for (int64_t bh = 0; bh < B * s.H; bh++) {
        std::vector<int> covered(s.T);
        for (int64_t r = 0; r < leaf.S; r++) {
            Slot e = slot_at(bh * leaf.S + r, leaves, leaf);
            counts = counts && e.first * s.tiles / s.T == r / leaf.tile_slots && e.last * s.tiles / s.T == r / leaf.tile_slots;
            for (int64_t t = e.first; t <= e.last; t++) covered[t]++;
        }
        for (int count : covered) once = once && count == 1;
    }
    test->that(once, "leaves cover each token once");
    test->that(counts, "as many in each tile as stated");
}

static void test_causal(int B, const LighthouseShape& s) {
    Test test(lighthouse_name("Causal Lighthouse", B, s, 0));
    size_t row = s.H * s.D, n = B * s.T * row;
    Doubles qkv = random_numbers(3 * n), dout = random_numbers(n), stats(B * s.H * s.T);
    Ints index, leaves;
    lighthouse<float>(qkv, dout, &index, 0, B, s);
    Results f = causal<float>(qkv, dout, &leaves, B, s), d = causal<double>(qkv, dout, &leaves, B, s);
    test.that(leaves == leaves_plainly(index, B, s), "leaves");
    check_leaves(&test, leaves, B, s);
    test.value("out", d[0], f[0], causal_plainly(&stats, qkv, leaves, B, s));
    test.value("stats", d[1], f[1], stats);
    test.that(d[3][0] && f[3][0], "no gradient of slots' queries");
    auto loss = [&] { return dot(causal_plainly(NULL, qkv, leaves, B, s), dout); };
    test.gradient("dqkv", d[2], f[2], {}, qkv, loss);

    // A token is changed, and all is made anew, the selection too: nothing before it may change, no bit.
    bool kept = true, reached = true;
    for (int trial = 0; trial < 12; trial++) {
        int64_t t = (int64_t)(uniform() * s.T), b = trial % B;
        Doubles changed = qkv, noise = random_numbers(3 * row, 2);
        std::copy(noise.begin(), noise.end(), &changed[(b * s.T + t) * 3 * row]);
        Ints anew;
        Doubles out = causal<float>(changed, dout, &anew, B, s)[0];
        bool after = false;
        for (size_t i = 0; i < n; i++) {
            bool may = (int64_t)(i / row / s.T) == b && (int64_t)(i / row % s.T) >= t;
            if (may) after = after || out[i] != f[0][i];
            else kept = kept && out[i] == f[0][i];
        }
        reached = reached && after;
    }
    test.that(kept, "a changed token changes nothing before it");
    test.that(reached, "but something from it on");
}

// With L = 2 and k = n_1 every leaf is a token: dense attention.
static void test_causal_is_dense(int B, const LighthouseShape& s) {
    Test test(lighthouse_name("Causal Lighthouse, all expanded, is dense attention", B, s, 0));
    size_t n = B * s.T * s.H * s.D;
    Doubles qkv = random_numbers(3 * n), dout = random_numbers(n);
    Ints leaves;
    Results f = causal<float>(qkv, dout, &leaves, B, s), d = causal<double>(qkv, dout, &leaves, B, s);
    Results dense = attention<double>(qkv, dout, B, s.T, s.H, s.D);
    const char* names[3] = {"out", "stats", "dqkv"};
    for (int i = 0; i < 3; i++) test.value(names[i], d[i], f[i], dense[i]);
}

// ---- the rules of lighthouse_shape ----------------------------------------------------------------------------

static void test_shapes() {
    {
        Test test("lighthouse_shape T 98304 H 8 D 128 L 3 p 4 k 1536 m 128");
        LighthouseShape s = shape_of(98304, 8, 128, 3, 4, 1536, 128);
        test.that(s.tiles == 12 && s.S == 18432 && s.tile_slots == 1536, "12 tiles, S 18432");
        test.that(s.n[0] == 98304 && s.n[1] == 24576 && s.n[2] == 6144, "entries of the levels");
        test.that(s.off[0] == 0 && s.off[1] == 98304 && s.off[2] == 122880 && s.off[3] == 129024, "their offsets");
        test.that(s.T == 98304 && s.H == 8 && s.D == 128 && s.levels == 3 && s.pool == 4 && s.topk == 1536 &&
                  s.tile == 128, "the settings");
    }
    struct { int64_t T; int levels, pool, topk, tile; const char* rule; } refused[] = {
        {4096, 1, 4, 128, 128, "levels"}, {4096, 9, 2, 128, 128, "levels"}, {4096, 3, 3, 128, 128, "pool"},
        {4096, 3, 1, 128, 128, "pool"}, {4096, 3, 0, 128, 128, "pool"}, {4096, 3, -4, 128, 128, "pool"},
        {4096, 2, 128, 128, 128, "tile"}, {4096, 3, 8, 14, 14, "tile"}, {4096, 3, 2, 33, 33, "tile"},
        {4096, 3, 2, 0, 0, "tile"}, {4096, 3, 4, 100, 128, "topk"}, {4096, 3, 4, 192, 128, "topk"},
        {4096, 3, 4, 0, 128, "topk"}, {4096, 3, 4, -128, 128, "topk"}, {4100, 3, 4, 128, 128, "divisible"},
        {4096 + 16, 3, 4, 256, 128, "divisible"}, {1000, 3, 4, 128, 128, "divisible"},
        {100, 5, 8, 16, 16, "divisible"}, {1024, 3, 4, 128, 128, "coarsest"}, {4096, 3, 4, 512, 128, "coarsest"},
        {4096 + 2048 + 1024, 3, 4, 1024, 128, "coarsest"},
    };
    for (auto& r : refused) {
        LighthouseShape s;
        auto passes = [&](int64_t T, int topk) {
            return lighthouse_shape(&s, T, 2, 16, r.levels, r.pool, topk, r.tile) == "";
        };
        std::string said = lighthouse_shape(&s, r.T, 2, 16, r.levels, r.pool, r.topk, r.tile);
        const char* why = said.c_str();
        Test test(text("lighthouse_shape T %d L %d p %d k %d m %d", (int)r.T, r.levels, r.pool, r.topk, r.tile));
        test.that(said != "", "refused");
        test.that(strstr(why, r.rule) != NULL, why);
        // Settings that the message names must pass.
        const char *lengths = strstr(why, "nearest length"), *most = strstr(why, "topk to at most ");
        if (lengths && strpbrk(lengths, "0123456789")) {
            long long below = 0, above = 0;
            int count = sscanf(strpbrk(lengths, "0123456789"), "%lld and %lld", &below, &above);
            test.that(passes(below, r.topk) && (count == 1 || passes(above, r.topk)), "lengths named pass");
        }
        if (most) test.that(passes(r.T, atoi(most + strlen("topk to at most "))), "topk named passes");
    }
}

int main() {
    test_exponential();
    test_encoder(1, 1, 1, 0, true);
    test_encoder(2, 7, 33, 0, false);
    test_encoder(3, 20, 96, 5, true);
    for (int64_t N : {1, 3, 50}) {
        for (int C : {5, 16, 48, 65}) test_layernorm(N, C);  // with one or two channels dinp nearly vanishes
    }
    test_matmul(1, 1, 1, true, true);
    test_matmul(1, 16, 7, true, false);
    test_matmul(7, 33, 45, false, true);
    test_matmul(130, 60, 150, true, true);
    test_matmul(300, 20, 9, false, false);
    test_matmul(5, 300, 33, true, false);
    for (bool gradient : {false, true}) test_fp8_numbers(gradient);
    test_fp8_amax();
    test_fp8_matmul(48, 32, 80, false);
    test_fp8_matmul(64, 100, 32, true);
    test_gelu(1);
    test_gelu(1000);
    test_crossentropy(1, 2, 2, 1);
    test_crossentropy(5, 257, 384, 1);
    test_crossentropy(9, 100, 101, 5);
    test_crossentropy(4, 50, 64, 200);
    for (int64_t n : {1, 1000, 65536 * 3 + 17}) test_sums(n);
    test_adamw(1, false, 0, 1);
    test_adamw(1003, false, 0.125, 0.25);
    test_adamw(1003, true, 0.125, 0.5);

    test_rope(1, 1, 1, 2, 10000, 0);
    test_rope(2, 37, 3, 20, 500000, 3000);
    test_rope(1, 2500, 1, 16, 10000, 0);
    test_rope_far();

    test_heads_pack(1, 1, 1, 1);
    test_heads_pack(1, 6, 2, 5);
    test_heads_pack(3, 5, 4, 7);
    test_heads_pack(2, 50, 3, 64);

    test_attention(1, 1, 1, 4, 1);
    test_attention(1, 70, 1, 1, 1);
    test_attention(2, 3, 1, 16, 1);
    test_attention(1, 64, 2, 32, 1);
    test_attention(2, 65, 3, 20, 1);
    test_attention(1, 130, 2, 64, 1);
    test_attention(1, 200, 1, 128, 1);
    test_attention(1, 150, 1, 32, 6);
    test_attention_long();

    struct { int B; LighthouseShape shape; } settings[] = {
        {1, shape_of(16, 1, 16, 2, 2, 4, 4)},      {2, shape_of(64, 2, 16, 2, 2, 16, 8)},
        {1, shape_of(512, 2, 32, 3, 4, 32, 16)},   {2, shape_of(240, 1, 20, 4, 2, 24, 8)},
        {1, shape_of(160, 2, 16, 5, 2, 8, 4)},     {1, shape_of(1024, 1, 16, 4, 4, 16, 8)},
        {2, shape_of(512, 3, 16, 4, 2, 16, 4)},    {1, shape_of(136, 1, 128, 2, 8, 16, 16)},
        {1, shape_of(1024, 1, 16, 3, 8, 16, 16)},  {3, shape_of(384, 1, 64, 2, 4, 96, 32)},
    };
    for (auto& setting : settings) {
        test_lighthouse(setting.B, setting.shape, 0);
        test_lighthouse(setting.B, setting.shape, 10000);
        for (int W = 2; W <= setting.shape.tiles; W++) {
            if (setting.shape.tiles % W) continue;
            test_parts(setting.B, setting.shape, W, 0);
            test_parts(setting.B, setting.shape, W, 10000);
        }
        test_selection(setting.B, setting.shape);
        test_causality(setting.B, setting.shape, 10000);
        test_causal(setting.B, setting.shape);
    }
    test_causal_is_dense(1, shape_of(64, 2, 16, 2, 4, 16, 16));
    test_causal_is_dense(2, shape_of(256, 1, 32, 2, 4, 64, 16));
    test_full_expansion(shape_of(64, 2, 16, 2, 4, 16, 16), 0);
    test_full_expansion(shape_of(256, 1, 32, 2, 4, 64, 16), 10000);
    test_shapes();
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
