/// An instruction-set tier. All but the portable one fuse multiply-adds and give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, vectorised by the compiler for the build target; the reference.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX2 with AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI.
    Avx512Vnni,
}

impl Isa {
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Avx512Vnni];

    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
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
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => Isa::Avx2.available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Isa::Avx512.available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The arithmetic whose bits the tier produces.
    pub fn arithmetic(self) -> &'static str {
        match self {
            Isa::Portable => "unfused",
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 | Isa::Avx512Vnni => "fused",
        }
    }

    /// The best tier of this machine.
    pub fn best() -> Isa {
        let by_speed = [Isa::Avx512Vnni, Isa::Avx512, Isa::AvxVnni, Isa::Avx2];
        by_speed.into_iter().find(|isa| isa.available()).unwrap_or(Isa::Portable)
    }

    /// The tier that `DORMOUSE_ISA` names, or the best one.
    pub fn from_environment() -> Result<Isa, String> {
        let Ok(wanted) = std::env::var("DORMOUSE_ISA") else { return Ok(Isa::best()) };
        match Isa::ALL.into_iter().find(|isa| isa.name() == wanted) {
            Some(isa) if isa.available() => Ok(isa),
            Some(_) => Err(format!("DORMOUSE_ISA={wanted}: this machine's processor cannot run that tier")),
            None => Err(format!(
                "DORMOUSE_ISA={wanted}: choose one of portable, avx2, avxvnni, avx512, avx512vnni"
            )),
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
            crate::cpu::Isa::Avx2 | crate::cpu::Isa::AvxVnni => unsafe { avx2($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            crate::cpu::Isa::Avx512 | crate::cpu::Isa::Avx512Vnni => unsafe { avx512($($arg),*) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("only x86-64 has this tier"),
        }
    }};
}
pub(crate) use dispatch;

/// As [`dispatch!`] for bodies that are generic over [`super::dots::Dots`] and over a constant of the caller's, `$planes`. They
/// take `$form` as their first argument where it is given: a constant, so that the body is compiled for it.
macro_rules! dispatch_dots {
    ($isa:expr, $planes:ident, $body:ident $([$form:expr])? ($($arg:ident : $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<const $planes: usize>($($arg: $ty),*) {
            $body::<crate::cpu::dots::Avx2Dots, $planes>($($form,)? $($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn avxvnni<const $planes: usize>($($arg: $ty),*) {
            $body::<crate::cpu::dots::AvxVnniDots, $planes>($($form,)? $($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<const $planes: usize>($($arg: $ty),*) {
            $body::<crate::cpu::dots::Avx512Dots, $planes>($($form,)? $($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn avx512vnni<const $planes: usize>($($arg: $ty),*) {
            $body::<crate::cpu::dots::Avx512VnniDots, $planes>($($form,)? $($arg),*)
        }
        match $isa {
            crate::cpu::Isa::Portable => $body::<crate::cpu::dots::PortableDots, $planes>($($form,)? $($arg),*),
            // SAFETY: a `Cpu` only ever holds a tier that this machine was found to have.
            #[cfg(target_arch = "x86_64")]
            crate::cpu::Isa::Avx2 => unsafe { avx2::<$planes>($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            crate::cpu::Isa::AvxVnni => unsafe { avxvnni::<$planes>($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            crate::cpu::Isa::Avx512 => unsafe { avx512::<$planes>($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            crate::cpu::Isa::Avx512Vnni => unsafe { avx512vnni::<$planes>($($arg),*) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("only x86-64 has this tier"),
        }
    }};
}
pub(crate) use dispatch_dots;
