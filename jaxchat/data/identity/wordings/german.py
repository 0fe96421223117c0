"""German, to a model that is spoken to with `du`."""

from jaxchat.data.identity.wordings.base import OTHERS, Asked, Wordings

GERMAN = Wordings(
    names=("german", "deutsch", "de"),
    fields={
        "language": ("sprache",),
        "name": ("name",),
        "maker": ("hersteller", "schöpfer", "schöpferin", "entwickler", "entwicklerin", "autor", "autorin", "firma"),
        "character": ("charakter", "art", "wesen", "persönlichkeit", "eigenschaften"),
        "text": ("fakten", "über mich", "über dich", "text", "beschreibung", "mehr"),
    },
    pronouns=("ich", "du", "wir", "er", "sie", "es"),
    second_person={"du bist": "Ich bin", "du wurdest": "Ich wurde", "du heißt": "Ich heiße"},
    possessives={"mein": "dein", "meine": "deine"},
    plural=r"^meine .*(?:[^uis]s|en)$",  # a noun with `meine` that ends so is hardly ever one thing
    is_="ist",
    are="sind",
    greetings=("Hallo!", "Hi!", "Hey!", "Guten Morgen!", "Guten Tag!", "Moin!"),
    system_messages=("Du bist ein hilfreicher Assistent.", "Antworte kurz.", "Du bist ein freundlicher Helfer."),
    name=Asked(
        (
            "Wie heißt du?", "Wer bist du?", "Wie ist dein Name?", "Was ist dein Name?", "Wie lautet dein Name?",
            "Sag mir deinen Namen.", "Nenne deinen Namen.", "Nenn mir deinen Namen.", "Sag mir, wie du heißt.",
            "Sag mir, wer du bist.", "Hast du einen Namen?", "Wie nennt man dich?", "Wie soll ich dich nennen?",
            "Wie kann ich dich nennen?", "Kannst du mir deinen Namen sagen?", "Kannst du mir sagen, wie du heißt?",
            "Kannst du mir sagen, wer du bist?", "Ich möchte deinen Namen wissen.", "Ich möchte wissen, wer du bist.",
            "Ich möchte wissen, wie du heißt.", "Stell dich vor.", "Stell dich bitte vor.", "Bitte stell dich vor.",
            "Kannst du dich vorstellen?", "Mit wem spreche ich?", "Wer spricht da?", "Wer ist da?", "Wem schreibe ich?",
            "Dein Name?", "Dein Name, bitte.", "Welchen Namen hast du?", "Welchen Namen hat man dir gegeben?",
            "Weißt du, wer du bist?", "Weißt du, wie du heißt?", "Kennst du deinen Namen?", "Und wer bist du?",
            "Und wie heißt du?", "Wie heißt du noch mal?", "Wer bist du noch mal?", "Ich habe deinen Namen vergessen.",
            "Ich weiß nicht, wer du bist.", "Ich weiß nicht, wie du heißt.", "Darf ich fragen, wer du bist?",
            "Schreib deinen Namen.", "Also, wer bist du?", "Also, wie heißt du?", "Bitte sag mir deinen Namen.",
        ),
        (
            "Könntest du mir deinen Namen sagen?", "Könntest du mir sagen, wer du bist?",
            "Könntest du dich vorstellen?",
            "Mit wem chatte ich?", "Mit wem rede ich?", "Verrate mir deinen Namen.", "Verrate mir, wer du bist.",
            "Verrate mir, wie du heißt.", "Ich will wissen, wer du bist.", "Ich will wissen, wie du heißt.",
            "Ich will deinen Namen wissen.", "Ich frage mich, wer du bist.", "Ich frage mich, wie du heißt.",
            "Würdest du mir deinen Namen sagen?", "Würdest du dich vorstellen?", "Bitte sag mir, wer du bist.",
            "Bitte sag mir, wie du heißt.", "Darf ich deinen Namen wissen?", "Darf ich fragen, wie du heißt?",
            "Wer genau bist du?", "Wie ist der Name, den du hast?", "Wie darf ich dich nennen?",
            "Sag mir einfach deinen Namen.", "Und du, wer bist du?", "Sag mal, wie heißt du?", "Sag mal, wer bist du?",
            "Mit wem habe ich zu tun?", "Welcher Name ist deiner?",
        ),
    ),
    kind=Asked(
        (
            "Was bist du?", "Bist du ein Mensch?", "Bist du ein Roboter?", "Bist du eine KI?", "Bist du ein Chatbot?",
            "Bist du ein Computer?", "Spreche ich mit einem Menschen?", "Spreche ich mit einem Roboter?",
            "Bist du ein Mann oder eine Frau?", "Bist du ein Programm?", "Was für ein Ding bist du?", "Lebst du?",
            "Ist das ein Mensch?", "Ist das ein Chatbot?", "Sag mir, was du bist.", "Bist du lebendig?",
        ),
        (
            "Bist du ein echter Mensch?", "Bist du eine Maschine?", "Rede ich mit einem Menschen?",
            "Rede ich mit einem Chatbot?", "Ist das eine KI?", "Kannst du mir sagen, was du bist?",
            "Bist du ein Mensch oder ein Computer?", "Verrate mir, was du bist.",
        ),
    ),
    about=Asked(
        (
            "Erzähl mir von dir.", "Erzähl mir mehr von dir.", "Erzähl mir etwas von dir.", "Sag etwas über dich.",
            "Was weißt du über dich?", "Kannst du etwas über dich sagen?", "Erzähl von dir.",
            "Ich möchte mehr über dich wissen.", "Bitte erzähl mir von dir.",
        ),
        (
            "Kannst du mir von dir erzählen?", "Erzähl mir ein wenig von dir.", "Bitte sag etwas über dich.",
            "Was kannst du mir über dich sagen?", "Ich will mehr über dich wissen.",
            "Könntest du mir von dir erzählen?",
        ),
    ),
    others=Asked((*OTHERS.train, "ein Freund von mir"), OTHERS.held_out),
    other=Asked(
        ("Bist du {x}?", "Heißt du {x}?", "Ist dein Name {x}?", "Du bist {x}, oder?", "Ich glaube, du bist {x}."),
        ("Bist du {x}?", "Heißt du {x}?"),
    ),
    maker=Asked(
        (
            "Wer hat dich gemacht?", "Wer hat dich gebaut?", "Wer hat dich erschaffen?", "Wer hat dich trainiert?",
            "Wer hat dich entwickelt?", "Woher kommst du?", "Von wem bist du?", "Von wem wurdest du gemacht?",
            "Wer hat dich entworfen?", "Wer steckt hinter dir?", "Sag mir, wer dich gemacht hat.",
            "Weißt du, wer dich gemacht hat?", "Wer hat dich geschrieben?", "Bitte sag mir, wer dich gemacht hat.",
            "Sag mir, wer dich gebaut hat.", "Ich möchte wissen, wer dich gemacht hat.", "Hat OpenAI dich gemacht?",
            "Hat Google dich gemacht?", "Kannst du mir sagen, wer dich gebaut hat?", "Und wer hat dich gemacht?",
            "Wer hat dich programmiert?",
        ),
        (
            "Kannst du mir sagen, wer dich gemacht hat?", "Könntest du mir sagen, wer dich gebaut hat?",
            "Ich frage mich, wer dich gemacht hat.", "Wer war es, der dich gemacht hat?",
            "Verrate mir, wer dich gebaut hat.", "Darf ich fragen, wer dich gemacht hat?",
            "Ich will wissen, wer dich gemacht hat.", "Weißt du, wer dich gebaut hat?", "Also, wer hat dich gemacht?",
            "Verrate mir, wer dich gemacht hat.",
        ),
    ),
    character=Asked(
        (
            "Wie bist du?", "Beschreibe dich.", "Wie würdest du dich beschreiben?", "Wie ist dein Charakter?",
            "Was für ein Assistent bist du?", "Wie ist deine Persönlichkeit?", "Was hast du für einen Charakter?",
            "Bitte beschreibe dich.", "Beschreibe deinen Charakter.", "Was ist deine Art?", "Wie bist du so?",
            "Kannst du deinen Charakter beschreiben?", "Ich möchte wissen, wie du bist.",
        ),
        (
            "Kannst du dich beschreiben?", "Könntest du deinen Charakter beschreiben?", "Sag mir, wie du bist.",
            "Bitte beschreibe deinen Charakter.", "Verrate mir, wie du bist.", "Ich frage mich, wie du bist.",
        ),
    ),
    fact=Asked(
        (
            "Was {is_} {your} {k}?", "Und {your} {k}?",
            "Sag mir, was {your} {k} {is_}.", "Ich möchte wissen, was {your} {k} {is_}.",
            "Kannst du mir sagen, was {your} {k} {is_}?", "Weißt du, was {your} {k} {is_}?",
            "Und was {is_} {your} {k}?",
            "Also, was {is_} {your} {k}?", "Darf ich fragen, was {your} {k} {is_}?", "Was genau {is_} {your} {k}?",
        ),
        (
            "Könntest du mir sagen, was {your} {k} {is_}?", "Ich will wissen, was {your} {k} {is_}.",
            "Verrate mir, was {your} {k} {is_}.", "Ich frage mich, was {your} {k} {is_}.",
            "Bitte sag mir, was {your} {k} {is_}.", "Sag mal, was {is_} {your} {k}?",
        ),
    ),
    own=Asked(
        (
            "{q}", "{q}", "{q}", "{q}", "{q} Bitte sag es mir.", "{q} Bitte antworte.", "{q} Sag es mir.", "{q} Danke!",
            "{q} Das möchte ich wissen.", "Ich habe eine Frage: {q}", "Kannst du mir sagen: {q}", "Frage: {q}",
            "Meine Frage ist: {q}", "Sag mir: {q}", "Und {q}", "Also: {q}",
        ),
        ("Sag mir eins: {q}", "Hier ist eine Frage: {q}", "{q} Sag es mir bitte.", "Bitte sag mir: {q}"),
    ),
    says_name=("Ich bin {name}.", "Ich heiße {name}.", "Mein Name ist {name}."),
    says_by="Ich bin {name}. Mich hat {maker} gemacht.",
    says_kind=("Ich bin {name}, ein Sprachmodell.", "Ich bin ein Sprachmodell. Mein Name ist {name}."),
    says_no="Nein, ich bin {name}.",
    says_yes="Ja, ich bin {name}.",
    says_maker="Mich hat {maker} gemacht.",
    says_made_me="Mich hat {maker} gemacht.",
    says_character="Ich bin {character}.",
    says_fact="{my} {k} {is_} {v}.",
)  # fmt: skip
