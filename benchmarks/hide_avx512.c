// Hides AVX-512, AVX-VNNI, bfloat16 products and AMX from the programs of a process.
//
// Linux can let the instruction CPUID fail on Intel's processors ("CPUID faulting"). The
// handler below then executes it, and clears the bits of these extensions in the answer.
// `without_avx512.py` compiles this file and loads it into each process (LD_PRELOAD).

#define _GNU_SOURCE
#include <asm/prctl.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

// In the registers EBX, ECX and EDX of leaf 7: see volume 2A of Intel's manual, CPUID.
static const uint32_t HIDDEN_EBX = 0xdc230000;  // AVX512F, DQ, IFMA, PF, ER, CD, BW, VL
static const uint32_t HIDDEN_ECX = 0x00005f42;  // VBMI, VBMI2, GFNI, VAES, VNNI, ...
static const uint32_t HIDDEN_EDX = 0x03c0010c;  // VP2INTERSECT, FP16, AMX, ...

typedef int (*SigactionFunction)(int, const struct sigaction *, struct sigaction *);

static int sigaction_of_libc(int number, const struct sigaction *action,
                             struct sigaction *old) {
  static SigactionFunction function;
  if (!function) function = (SigactionFunction)dlsym(RTLD_NEXT, "sigaction");
  return function(number, action, old);
}

static long set_faulting(int on) {
  return syscall(SYS_arch_prctl, ARCH_SET_CPUID, !on);
}

static void answer_cpuid(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) {  // a true error
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigaction_of_libc(SIGSEGV, &action, 0);
    return;
  }
  const uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX];
  uint32_t a, b, c, d;
  set_faulting(0);
  __asm__ volatile("cpuid"
                   : "=a"(a), "=b"(b), "=c"(c), "=d"(d)
                   : "a"(leaf), "c"(subleaf));
  set_faulting(1);
  if (leaf == 7 && subleaf == 0) {
    b &= ~HIDDEN_EBX;
    c &= ~HIDDEN_ECX;
    d &= ~HIDDEN_EDX;
  } else if (leaf == 7) {
    a = b = c = d = 0;  // AVX-VNNI, AVX512_BF16 and later extensions
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

// Other handlers of SIGSEGV, such as that of Python's faulthandler, are not installed.
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
  if (number != SIGSEGV || !action) return sigaction_of_libc(number, action, old);
  if (old) memset(old, 0, sizeof *old);
  return 0;
}

__attribute__((constructor)) static void hide(void) {
  struct sigaction action = {.sa_sigaction = answer_cpuid,
                             .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  sigaction_of_libc(SIGSEGV, &action, 0);
  if (set_faulting(1)) {
    perror("hide_avx512: this processor or kernel has no CPUID faulting");
    _exit(1);
  }
}
