// The sums of wgmma's asm statements, as many as its width asks for: asm cannot loop over registers.
#pragma once
// Where they stand: always first
#define SUMS_4 "%0,%1,%2,%3"
#define SUMS_8 SUMS_4 ",%4,%5,%6,%7"
#define SUMS_16 SUMS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SUMS_32 SUMS_16 \
    ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SUMS_64 SUMS_32 \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SUMS_96 SUMS_64 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define SUMS_128 SUMS_96 \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// And what they are: d[i] and on, each a `kind` of register
#define REGISTERS_4(kind, d, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define REGISTERS_8(kind, d, i) REGISTERS_4(kind, d, i), REGISTERS_4(kind, d, i + 4)
#define REGISTERS_16(kind, d, i) REGISTERS_8(kind, d, i), REGISTERS_8(kind, d, i + 8)
#define REGISTERS_32(kind, d, i) REGISTERS_16(kind, d, i), REGISTERS_16(kind, d, i + 16)
#define REGISTERS_64(kind, d, i) REGISTERS_32(kind, d, i), REGISTERS_32(kind, d, i + 32)
#define REGISTERS_96(kind, d, i) REGISTERS_64(kind, d, i), REGISTERS_32(kind, d, i + 64)
#define REGISTERS_128(kind, d, i) REGISTERS_64(kind, d, i), REGISTERS_64(kind, d, i + 64)
