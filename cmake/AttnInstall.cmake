# SPDX-License-Identifier: MIT
#
# `cmake --install`: headers, library, attnConfig.cmake and attn.pc.  The component `python`, which only
# the wheel asks for, is the two shared objects under their plain names, to lie beside __init__.py.

include(CMakePackageConfigHelpers)

install(TARGETS attn EXPORT attnTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES include/attn/attn.h "${DLPACK_DIR}/dlpack.h"
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/attn)

set(attn_config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/attn)
install(EXPORT attnTargets NAMESPACE attn:: DESTINATION ${attn_config_dir})
configure_package_config_file(cmake/attnConfig.cmake.in attnConfig.cmake
  INSTALL_DESTINATION ${attn_config_dir})
# 0.x: a minor version may change the ABI.
write_basic_package_version_file(attnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  "${CMAKE_CURRENT_BINARY_DIR}/attnConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/attnConfigVersion.cmake"
  DESTINATION ${attn_config_dir})

# The prefix as seen from the file, so that an installed tree may move.
file(RELATIVE_PATH ATTN_PC_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
string(REGEX REPLACE "/$" "" ATTN_PC_PREFIX "${ATTN_PC_PREFIX}")
configure_file(cmake/attn.pc.in attn.pc @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/attn.pc" DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(FILES $<TARGET_FILE:attn> RENAME libattn.so DESTINATION libattn
  COMPONENT python EXCLUDE_FROM_ALL)
if(TARGET attn_ffi)
  install(TARGETS attn_ffi LIBRARY DESTINATION libattn COMPONENT python EXCLUDE_FROM_ALL)
endif()
