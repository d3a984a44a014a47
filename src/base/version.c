#include <arrowquant/base.h>

const char *aq_version(void) { return AQ_VERSION; }
