/// An instruction-set tier. Tiers differ in bits (fused multiply-add or not), so a session's numerics tag names one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, vectorised by the compiler for the build target; the reference.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this machine can run the tier.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best tier of this machine.
    pub fn best() -> Isa {
        if Isa::Avx512.available() {
            Isa::Avx512
        } else if Isa::Avx2.available() {
            Isa::Avx2
        } else {
            Isa::Portable
        }
    }

    /// The tier that `DORMOUSE_ISA` names, or the best one.
    pub fn from_environment() -> Result<Isa, String> {
        let Ok(wanted) = std::env::var("DORMOUSE_ISA") else { return Ok(Isa::best()) };
        match Isa::ALL.into_iter().find(|isa| isa.name() == wanted) {
            Some(isa) if isa.available() => Ok(isa),
            Some(_) => Err(format!("DORMOUSE_ISA={wanted}: this machine's processor cannot run that tier")),
            None => Err(format!("DORMOUSE_ISA={wanted}: choose one of portable, avx2, avx512")),
        }
    }
}

/// Instantiates a kernel body, generic over [`super::lanes::Lanes`], for every tier, and calls the one of `$isa`.
///
/// `dispatch!(isa, body(arguments…) : (types…))`
macro_rules! dispatch {
    ($isa:expr, $body:ident($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2($($arg: $ty),*) $(-> $ret)? {
            $body::<crate::cpu::lanes::Avx2>($($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512($($arg: $ty),*) $(-> $ret)? {
            $body::<crate::cpu::lanes::Avx512>($($arg),*)
        }
        match $isa {
            crate::cpu::Isa::Portable => $body::<crate::cpu::lanes::Portable>($($arg),*),
            // SAFETY: a `Cpu` only ever holds a tier that this machine was found to have.
            #[cfg(target_arch = "x86_64")]
            crate::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            crate::cpu::Isa::Avx512 => unsafe { avx512($($arg),*) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("only x86-64 has this tier"),
        }
    }};
}
pub(crate) use dispatch;
