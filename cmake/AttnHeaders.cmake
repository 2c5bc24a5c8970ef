# SPDX-License-Identifier: MIT
#
# Sets DLPACK_DIR (holds dlpack.h) and TVM_FFI_DIR (holds tvm/ffi/c_api.h, empty when there is none)
# from DLPACK_INCLUDE and TVM_FFI_INCLUDE, or else from the Python package apache-tvm-ffi, which
# carries both.  The package is looked up, not imported: importing it may import torch.

if(NOT DLPACK_INCLUDE OR NOT TVM_FFI_INCLUDE)
  find_package(Python 3.10 COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import importlib.util as u; s = u.find_spec('tvm_ffi'); print(s.submodule_search_locations[0] + '/include' if s else '')"
      OUTPUT_VARIABLE tvm_ffi_package_include OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()

find_path(DLPACK_DIR dlpack.h PATH_SUFFIXES dlpack NO_CACHE NO_CMAKE_FIND_ROOT_PATH
  HINTS ${DLPACK_INCLUDE} ${tvm_ffi_package_include})
string(REGEX REPLACE "/$" "" DLPACK_DIR "${DLPACK_DIR}")
if(NOT DLPACK_DIR)
  message(FATAL_ERROR "libattn needs dlpack.h: pip install apache-tvm-ffi into the Python that CMake "
                      "finds, or pass -DDLPACK_INCLUDE=<folder of dlpack.h>")
endif()

set(TVM_FFI_DIR "")
foreach(dir IN ITEMS ${TVM_FFI_INCLUDE} ${tvm_ffi_package_include})
  if(NOT TVM_FFI_DIR AND EXISTS "${dir}/tvm/ffi/c_api.h")
    # c_api.h includes <dlpack/dlpack.h>: a folder apart from it when the two come from different places.
    set(TVM_FFI_DIR "${dir}")
    if(NOT EXISTS "${dir}/dlpack/dlpack.h")
      get_filename_component(dlpack_parent "${DLPACK_DIR}" DIRECTORY)
      list(APPEND TVM_FFI_DIR "${dlpack_parent}")
    endif()
  endif()
endforeach()
message(STATUS "libattn: dlpack.h from ${DLPACK_DIR}")
