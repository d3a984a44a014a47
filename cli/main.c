#include <stdio.h>

#include <arrowquant/arrowquant.h>

int main(void) {
    printf("arrowquant %s\n", aq_version());
    return 0;
}
