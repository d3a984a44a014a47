/* Benchmarks: each prints ratios to a peer or to memory bandwidth measured in the same run. Times are the shortest of several runs. */
#ifndef AQ_BENCH_H
#define AQ_BENCH_H

int bench_gemm(int argc, char **argv);
int bench_linear(int argc, char **argv);
int bench_quant(int argc, char **argv);
int bench_model(int argc, char **argv);
int bench_solve(int argc, char **argv);

#endif
