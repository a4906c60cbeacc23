"""The words of several languages that folder and file names use, in lower case and without accents."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# English; German; French; Spanish, Italian and Portuguese; Dutch, Polish and Turkish; Russian.
GOOD = _words("""
    good goods ok okay oks normal normals normally pass passed passes passing accept accepted acceptable healthy
    flawless faultless undamaged conforming conform conformant nondefective defectfree faultfree
    gut gute guter gutes guten fehlerfrei fehlerlos einwandfrei mangelfrei normale konform ordnung
    bon bons bonne bonnes normaux normales conforme conformes
    bueno buena buenos buenas buono buona buoni buone bom boa boas normali conformi
    goed goede dobry dobra dobre dobrze poprawny poprawne normalny normalne saglam iyi
    годные годныи годная годен хорошие хорошии хорошая норма нормальные нормальныи исправные исправныи
""")
BAD = _words("""
    bad ng ngs nok noks ko kos notok notgood nogood noconform unnormal unacceptable fail fails failed failing failure
    faulty wrong unhealthy nonconforming nonconformant nonconform nonconformity scrap scraps scrapped
    mangelhaft mangel maengel fehler kaputt kaputte aussortiert aussortierte reklamation reklamationen
    mauvais mauvaise mauvaises rebut rebuts nonconforme
    malo mala malos malas ruim ruins cattivo cattivi cattiva scarto scarti
    slecht slechte fout foute afkeur zly zle wada wady hatali bozuk kotu
    негодные негодныи плохие плохои неисправные
""")
BAD_STEMS = tuple(
    _words("""
    defect defekt defaut difett defeit anomal anormal abnorm unnormal reject fault flaw fehlerhaft schlecht ausschuss
    wadliw
    дефект брак аномал
""")
)
# Kinds of defects, which say defective as well.
DEFECTS = _words("""
    dent dents dented rust rusty stain stains burr burrs dirty dirt riss risse delle dellen bruch schaden
    misprint misprints bent porosity pores
""")
DEFECT_STEMS = tuple(
    _words("""
    crack scratch broken breakage damag blowhole corros contamin deform kratzer beschadig rayure fissur grieta rasgun
    graffi arranhao трещин царапин
""")
)
# May mean either: a positive result of an inspection is a defect, a positive sample may be a good part.
EITHER = _words("""
    positive positives negative negatives pos neg positiv negativ positif negatif positivo negativo positivos negativos
    true false clean
""")
NEGATIONS = _words("not no non nicht kein keine keinen nie pas sans ohne without sin senza sem niet zonder не без")
FREE = _words("free frei")
FILLERS = _words("""
    a an of the in so very quite any with and und et y e de des der die das for only all new is are
    jpg jpeg png bmp tif tiff
""")
NOUNS = _words("""
    image images img imgs pic pics picture pictures photo photos foto fotos part parts piece pieces sample samples
    specimen specimens item items product products data dataset set folder unit units frame frames file files example
    examples class classes category type types jpegimages bild bilder teil teile aufnahme aufnahmen muster
    pieza piezas imagen imagenes immagini pezzi onderdelen
""")
TRAIN = _words("train training trainset trainingset trainingsdaten entrainement entrenamiento addestramento")
TEST = _words("test testing tests testset testdaten val valid validation validierung prueba")

# Scripts without spaces: these words are looked for inside longer ones, except those that have to stand alone.
UNSPACED_ALONE = {
    **{"良": "good", "好": "good", "好的": "good", "优": "good", "差": "bad", "坏": "bad", "坏的": "bad"},
    **{"不": "not", "非": "not", "未": "not", "无": "not", "無": "not", "没有": "not"},
}
UNSPACED_DEFECTS = _words("""
    划痕 劃痕 裂纹 裂紋 裂缝 裂縫 破损 破損 凹陷 污渍 污漬 刮伤 刮傷 擦伤 擦傷 傷 キズ 汚れ 割れ 打痕 스크래치 균열 파손
""")
_UNSPACED = {
    "good": _words("""
        无缺陷 無缺陷 无瑕疵 无异常 無異常 無欠陥 欠陥なし 異常なし 무결함 이상없음
        良品 正常 合格 良好 完好 양품 정상 합격
    """),
    "bad": UNSPACED_DEFECTS
    | _words("""
        不良品 不良 不合格品 不合格 不正常 非正常 不好 异常 異常 缺陷 欠陥 瑕疵 次品 废品 廢品 残次品
        불량품 불량 비정상 불합격 결함
    """),
    "unclear": _words("阳性 阴性 陽性 陰性 正样本 负样本 正例 负例 양성 음성"),
    "mask": _words("掩码 掩膜 掩模 遮罩 マスク 마스크"),
    "train": _words("训练集 训练 訓練 学習 훈련 학습"),
    "test": _words("测试集 测试 測試 テスト 验证集 验证 테스트"),
    "filler": _words("图片 图像 圖片 圖像 图 圖 照片 样本 样品 品 件 数据 画像 写真 データ 이미지 사진 的"),
}
# Longest first, because 不良品 holds 良品.
UNSPACED = sorted(
    ((word, role) for role, listed in _UNSPACED.items() for word in listed), key=lambda p: (-len(p[0]), p)
)
