/* Benchmarks: prints ratios to a peer or to memory bandwidth measured in the same run. */
#include <stdio.h>

#include <arrowquant/arrowquant.h>

int main(void) {
    printf("isa %s\n", aq_isa_name());
    return 0;
}
