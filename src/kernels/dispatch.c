#include <arrowquant/base.h>

const char *aq_isa_name(void) { return "scalar"; }
