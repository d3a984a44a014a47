# Everything that is not ours, behind one target: aq_dependencies.

find_package(PkgConfig REQUIRED)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson>=2.13)
pkg_check_modules(YAML REQUIRED IMPORTED_TARGET yaml-0.1)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(ZSTD REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(ZLIB REQUIRED IMPORTED_TARGET zlib)
pkg_check_modules(CRYPTO REQUIRED IMPORTED_TARGET libcrypto)
find_package(Threads REQUIRED)

# Parquet: an installed carquet when there is one, else the pinned source package.
set(CARQUET_VERSION 0.7.2)
set(CARQUET_SHA256 5d57c00217906e672fe8b569d8a24c6cbd6d1ab7736d56057e9b884f1a043e7d)
find_package(carquet ${CARQUET_VERSION} EXACT CONFIG QUIET)
if(carquet_FOUND)
    set(AQ_CARQUET $<BUILD_INTERFACE:carquet::carquet>)
else()
    # Shared by all build folders of this checkout; unpacked once.
    set(_deps ${CMAKE_SOURCE_DIR}/build/_deps)
    set(_archive ${_deps}/carquet-${CARQUET_VERSION}.tar.gz)
    set(_hash "")
    if(EXISTS ${_archive})
        file(SHA256 ${_archive} _hash)
    endif()
    if(NOT _hash STREQUAL CARQUET_SHA256)
        find_package(Python3 REQUIRED COMPONENTS Interpreter)
        message(STATUS "Fetching the source package of carquet ${CARQUET_VERSION} from PyPI")
        execute_process(
            COMMAND ${Python3_EXECUTABLE} -m pip download --quiet --no-deps --no-binary carquet --dest ${_deps} carquet==${CARQUET_VERSION}
            RESULT_VARIABLE _failed)
        if(EXISTS ${_archive})
            file(SHA256 ${_archive} _hash)
        endif()
        if(_failed OR NOT _hash STREQUAL CARQUET_SHA256)
            message(FATAL_ERROR "carquet-${CARQUET_VERSION}.tar.gz could not be had, or its SHA-256 is not the pinned one.\n"
                                "Put the file from PyPI into ${_deps} and run CMake again.")
        endif()
    endif()
    if(NOT EXISTS ${_deps}/carquet-${CARQUET_VERSION}/native/CMakeLists.txt)
        file(ARCHIVE_EXTRACT INPUT ${_archive} DESTINATION ${_deps})
    endif()
    set(CARQUET_BUILD_CLI OFF CACHE BOOL "" FORCE)
    set(CARQUET_BUILD_SHARED OFF CACHE BOOL "" FORCE)
    set(CARQUET_ENABLE_BROTLI OFF CACHE BOOL "" FORCE)
    set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
    set(CMAKE_DISABLE_FIND_PACKAGE_OpenMP ON) # a thread pool inside would not survive a fork (docs/decisions/001-threads.md)
    add_subdirectory(${_deps}/carquet-${CARQUET_VERSION}/native ${CMAKE_BINARY_DIR}/carquet EXCLUDE_FROM_ALL)
    set_target_properties(carquet PROPERTIES C_VISIBILITY_PRESET hidden C_EXTENSIONS ON INTERPROCEDURAL_OPTIMIZATION OFF)
    target_compile_options(carquet PRIVATE -w -fno-lto) # its Release flags ask for LTO, which costs every link of ours seconds
    if(ARROWQUANT_SANITIZE MATCHES "undefined")
        # It adds 0 to a null pointer for empty values and loads unaligned words where the CPU allows it: undefined to the letter, harmless in practice;
        # the other checks stay on.
        target_compile_options(carquet PRIVATE -fno-sanitize=pointer-overflow,alignment)
    endif()
    set(AQ_CARQUET $<BUILD_INTERFACE:carquet>)
endif()

add_library(aq_dependencies INTERFACE)
target_link_libraries(aq_dependencies INTERFACE ${AQ_CARQUET}
    $<BUILD_INTERFACE:PkgConfig::JANSSON> $<BUILD_INTERFACE:PkgConfig::YAML> $<BUILD_INTERFACE:PkgConfig::XXHASH>
    $<BUILD_INTERFACE:PkgConfig::ZSTD> $<BUILD_INTERFACE:PkgConfig::ZLIB> $<BUILD_INTERFACE:PkgConfig::CRYPTO>
    Threads::Threads m)
install(TARGETS aq_dependencies EXPORT arrowquantTargets)
