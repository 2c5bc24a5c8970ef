# SPDX-License-Identifier: MIT
#
# Compiler and linker flags, and the one rule that turns a file's name into its instruction set.

set(ATTN_WARNINGS -Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes)
if(ATTN_WERROR)
  list(APPEND ATTN_WARNINGS -Werror)
endif()

# sqrt and friends inline; nothing else of the floating-point rules is loosened.
set(ATTN_CODE_FLAGS -fno-math-errno)
set(ATTN_LINK_FLAGS -Wl,--as-needed -Wl,-z,relro -Wl,-z,now -Wl,-z,noexecstack -Wl,--exclude-libs,ALL)
set(ATTN_NO_UNDEFINED -Wl,-z,defs)

set(ATTN_SANITIZE_FLAGS "")
if(ATTN_SANITIZE)
  set(ATTN_SANITIZE_FLAGS -fsanitize=${ATTN_SANITIZE} -fno-omit-frame-pointer)
  if(ATTN_SANITIZE MATCHES "undefined")
    list(APPEND ATTN_SANITIZE_FLAGS -fno-sanitize-recover=undefined)
  endif()
  list(APPEND ATTN_CODE_FLAGS ${ATTN_SANITIZE_FLAGS})
  list(APPEND ATTN_WARNINGS -Wno-sign-conversion) # gcc 12's own intrinsics warn when instrumented
  list(APPEND ATTN_LINK_FLAGS ${ATTN_SANITIZE_FLAGS})
  set(ATTN_NO_UNDEFINED "") # clang leaves its run time to the executable
endif()

# Each rung holds the one before it.
set(ATTN_ISA_avx2 -mavx2 -mfma -mf16c)
set(ATTN_ISA_avx512
  ${ATTN_ISA_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
set(ATTN_ISA_avx512bf16 ${ATTN_ISA_avx512} -mavx512bf16)
set(ATTN_ISA_amx ${ATTN_ISA_avx512bf16} -mamx-tile -mamx-bf16)

# Gives each of the sources the flags of the rung its name ends in.  A product and a sum may fuse in
# kernels; never in baseline code, whose _ref files are the oracle.
function(attn_set_isa_flags)
  foreach(source IN LISTS ARGN)
    if(source MATCHES "_(avx2|avx512|avx512bf16|amx)\\.c$")
      set(flags ${ATTN_ISA_${CMAKE_MATCH_1}} -ffp-contract=fast)
    else()
      set(flags -ffp-contract=off)
    endif()
    set_property(SOURCE "${source}" APPEND PROPERTY COMPILE_OPTIONS "${flags}")
  endforeach()
endfunction()
